"""Settings that do not go together are refused with a sentence that says what would."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import trl
from policy_world import SMALL
from pydantic import ValidationError
from transformers import TrainingArguments

from posttrain.errors import StageError
from posttrain.methods.grpo import GrpoConfig
from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.policy import trl_options
from posttrain.policy.trainer import GRPO_RELIED_ON, trl_arguments
from posttrain.policy.trl_options import FREE, OWN, problem_of
from posttrain.training.trl_seam import require_trl

SHAPING = {"short": {"type": "length", "target": 0, "limit": 8}}


def test_the_installed_trl_is_the_one_that_is_known() -> None:
    require_trl(trl.GRPOTrainer, GRPO_RELIED_ON)


@pytest.mark.parametrize("name", GRPO_RELIED_ON)
def test_another_trl_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.GRPOTrainer, name, lambda self, something: None)
    with pytest.raises(StageError, match=rf"(?s)GRPOTrainer.{name} of TRL .*something.*trl>=1.16"):
        require_trl(trl.GRPOTrainer, GRPO_RELIED_ON)


def fields_of(one: type) -> set[str]:
    return {field.name for field in dataclasses.fields(one)}


def test_every_field_of_trls_config_is_free_or_the_stages_own() -> None:
    assert FREE | OWN.keys() == fields_of(trl.GRPOConfig) - fields_of(TrainingArguments)
    assert not FREE & OWN.keys()


def test_what_a_field_is_set_by_instead_exists() -> None:
    for name, instead in OWN.items():
        setting, _, value = instead.partition("=")
        first = setting.split(".")[0]
        if instead:
            assert first in GrpoConfig.model_fields, (name, instead)
        if value:
            GrpoConfig(**{setting: value})
        if first == "trl":
            assert setting.removeprefix("trl.") in FREE


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("vespo_k_pos", None),
        ("temperature", ("trl.temperature is decided by the stage", "set temperature")),
        ("use_vllm", ("trl.use_vllm is decided by the stage", "set rollout=vllm_colocate")),
        ("shuffle_dataset", ("trl.shuffle_dataset is decided by the stage", "leave trl.shuffle_dataset out")),
        (
            "vespo_k_poz",
            ("TRL's GRPOConfig has no vespo_k_poz that a stage could pass on", "did you mean trl.vespo_k_pos?"),
        ),
        ("learning_rate", ("TRL's GRPOConfig has no learning_rate that a stage could pass on", "")),
    ],
)
def test_what_is_wrong_with_a_field(name: str, problem: tuple[str, str] | None) -> None:
    assert problem_of(name) == problem


def test_free_fields_are_passed_on(tmp_path: Any) -> None:
    from posttrain.pipeline.context import StageContext

    config = GrpoConfig(**{**SMALL, "loss_type": "sapo", "trl": {"sapo_temperature_neg": 3.0}})
    found = trl_arguments(StageContext("rl", config, tmp_path), config)
    assert found["sapo_temperature_neg"] == 3.0 and found["loss_type"] == "sapo"
    assert set(found) - set(FREE) <= set(OWN)
    assert trl_options.problem_of("sapo_temperature_neg") is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"generation_batch_size": 18}, r"must be a multiple of num_generations \(4\), e.g. generation_batch_size=16"),
        ({"generation_batch_size": 3}, "e.g. generation_batch_size=4"),
        ({"updates_per_generation": 3}, r"\(16\) must be a multiple of updates_per_generation \(3\)"),
        ({"updates_per_generation": 2, "num_iterations": 2, "max_steps": 6}, r"\(4\), e.g. max_steps=4"),
        ({"num_iterations": 5}, r"max_steps \(3\) must be a multiple .* e.g. max_steps=5"),
        ({"trl": {"vespo_k_poz": 1}}, r"no vespo_k_poz .*did you mean trl\.vespo_k_pos\?"),
        ({"trl": {"num_generations": 4}}, "trl.num_generations is decided by the stage: set num_generations"),
        ({"lora": {}, "trainable": "mixers"}, "trainable=mixers and lora both choose what is trained"),
        ({"cuda_graph": "on"}, "cuda_graph=on.*use cuda_graph=auto"),
        ({"rewards": {}}, "rewards"),
        ({"rewards": {"one": {"type": "no such"}}}, "rewards"),
        ({"num_generations": 1}, "num_generations"),
        ({"loss_type": "ppo"}, "loss_type"),
    ],
)
@pytest.mark.parametrize("config", [GrpoConfig, RiskpoConfig])
def test_settings_are_refused(config: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**{**SMALL, "risk": {"bundle_size": 1}, **fields} if config is RiskpoConfig else {**SMALL, **fields})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"risk": {"bundle_size": 3}},
            r"the 4 questions of a roll-out batch \(generation_batch_size=16 by num_generations=4\) are no whole "
            "number of bundles of 3: generation_batch_size=12 has 3",
        ),
        ({"risk": {"bundle_size": 5}}, "generation_batch_size=20 has 5 questions"),
        ({"risk_reward": "short"}, "risk_reward=short is none of the rewards correct"),
        ({"rewards": SHAPING}, "no reward judges correctness: name the one to take the risk of in risk_reward"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "normalize_then_sum is GRPO's"),
        (
            {"risk": {"risk": "pass_at_k", "level": "question", "k": 5}},
            "risk.k=5 exceeds num_generations=4",
        ),
        ({"preset": "published"}, "preset"),
    ],
)
def test_risk_settings_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RiskpoConfig(**{**SMALL, "risk": {"bundle_size": 2}, **fields})


def test_what_is_refused_by_one_is_fine_by_the_other() -> None:
    GrpoConfig(**{**SMALL, "multi_objective_aggregation": "normalize_then_sum", "rewards": SHAPING})
    assert RiskpoConfig(**{**SMALL, "risk": {"bundle_size": 3, "level": "question"}}).risk.level == "question"
    shaped = RiskpoConfig(**{**SMALL, "risk": {"bundle_size": 2}, "rewards": SHAPING, "risk_reward": "short"})
    assert shaped.risk_rewards == ("short",)
    both = RiskpoConfig(**{**SMALL, "risk": {"bundle_size": 2}, "rewards": {**SHAPING, **SMALL["rewards"]}})
    assert both.risk_rewards == ("correct",)


def test_derived_numbers() -> None:
    config = GrpoConfig(**{**SMALL, "updates_per_generation": 2, "num_iterations": 3, "max_steps": 12})
    assert (config.questions_per_batch, config.steps_per_rollout, config.rollouts) == (4, 6, 2)
    assert config.sequences_per_step == 8 and config.micro_batch() == 4 and config.micro_batch(4) == 2
    with pytest.raises(ValueError, match="cannot be shared by 3 ranks"):
        config.check_ranks(3)
    found = trl_arguments(type("C", (), {"world_size": 2})(), config)
    assert (found["steps_per_generation"], found["num_iterations"]) == (2, 3)
    assert found["min_p"] is None and found["shuffle_dataset"] is False


@pytest.mark.parametrize(
    ("rollout", "fields"),
    [
        ("auto", {"use_vllm": False, "use_transformers_continuous_batching": False}),
        ("continuous_batching", {"use_vllm": False, "use_transformers_continuous_batching": True}),
        ("vllm_colocate", {"use_vllm": True, "vllm_mode": "colocate"}),
        ("vllm_server", {"use_vllm": True, "vllm_mode": "server"}),
    ],
)
def test_who_writes_is_told_to_trl(rollout: str, fields: dict[str, Any]) -> None:
    config = GrpoConfig(**{**SMALL, "rollout": rollout})
    found = trl_arguments(type("C", (), {"world_size": 1})(), config)
    assert {name: found[name] for name in fields} == fields
    assert ("vllm_mode" in found) == rollout.startswith("vllm")


def test_a_presets_loss_reaches_the_trainer() -> None:
    config = RiskpoConfig(**{**SMALL, "max_steps": 4, "preset": "released_dapo", "generation_batch_size": 40})
    found = trl_arguments(type("C", (), {"world_size": 1})(), config)
    assert (found["loss_type"], found["importance_sampling_level"], found["delta"]) == ("bnpo", "token", 3.0)
    assert config.updates_per_generation == 4 and config.risk.credit == "sum_mean"
    own = RiskpoConfig(**{**SMALL, "preset": "released_dapo", "generation_batch_size": 40, "updates_per_generation": 1})
    assert own.updates_per_generation == 1 and own.loss_type == "bnpo"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GrpoConfig, {"loss_type": "cispo"}, "epsilon_high, which is then 1 or more"),
        (GrpoConfig, {"trl": {"repetition_penalty": 1.1}}, "trl.repetition_penalty does nothing with rollout=auto"),
        (GrpoConfig, {"trl": {"vllm_server_port": 1}}, "does nothing with rollout=auto: rollout=vllm_colocate or"),
        (GrpoConfig, {"trl": {"sync_ref_model": True}}, "trl.sync_ref_model is decided by the stage"),
        (GrpoConfig, {"trl": {"chat_template_kwargs": {}}}, "trl.chat_template_kwargs is decided by the stage"),
        (RiskpoConfig, {"scale_rewards": "batch"}, "does nothing here: set risk.scale"),
        (
            RiskpoConfig,
            {
                "risk": {"risk": "pass_at_k", "level": "question", "k": 2},
                "rewards": {"correct": {"type": "gym", "threshold": None}},
            },
            "without partial credit",
        ),
        (
            RiskpoConfig,
            {
                "risk": {"risk": "pass_at_k", "level": "question", "k": 2},
                "rewards": {"correct": {"type": "gym", "weight": 2}},
            },
            "with weight 1",
        ),
    ],
)
def test_settings_that_would_do_nothing_or_harm(kind: Any, fields: dict[str, Any], message: str) -> None:
    base = {"max_steps": 4, "num_generations": 4, "generation_batch_size": 20}
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**{**base, **fields})


def test_settings_that_do_something_are_taken() -> None:
    base = {"max_steps": 4, "num_generations": 4, "generation_batch_size": 20}
    assert GrpoConfig(**base, loss_type="cispo", epsilon_high=5.0).epsilon_high == 5
    assert GrpoConfig(**base, rollout="transformers", trl={"repetition_penalty": 1.1}).trl
    assert GrpoConfig(**base, rollout="vllm_server", trl={"vllm_server_port": 1}).trl
    assert RiskpoConfig(**base, preset="neutral").scale_rewards == "group"
    assert RiskpoConfig(**base, risk={"risk": "pass_at_k", "level": "question", "k": 2}).risk.k == 2
