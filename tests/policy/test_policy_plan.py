"""What a plan knows of a policy-gradient stage, without torch: checks, estimates, notes, and what enters the key."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from policy_world import SMALL
from source_models import make_source

from posttrain.errors import RecipeError
from posttrain.methods.grpo import Grpo, GrpoConfig
from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.methods.riskpo.stage import Riskpo
from posttrain.models.architecture import normalise, parameter_count
from posttrain.pipeline.fingerprint import key_document, key_of
from posttrain.pipeline.stage import ArtifactMeta

REFERENCES = {"model": "model", "data": "data.train"}
GYM = {"fields": ["id", "messages", "task", "answer"], "rows": "messages+task"}


def metas(count: int | None = 200, **extra: Any) -> dict[str, ArtifactMeta]:
    arch = normalise(make_source("llama").config.to_dict())
    data = ArtifactMeta("dataset", rows=count, tokens=None if count is None else 40 * count, extra=extra or GYM)
    return {"model": ArtifactMeta("model", architecture=arch), "data": data}


def config(**fields: Any) -> GrpoConfig:
    return GrpoConfig(**{**SMALL, "rewards": {"correct": {"type": "gym"}}, "inputs": REFERENCES, **fields})


def test_plan_needs_no_torch() -> None:
    code = (
        "import sys, posttrain.methods.grpo as g, posttrain.methods.riskpo.stage as r;"
        "import posttrain.methods.riskpo.config as c;"
        "g.GrpoConfig(), c.RiskpoConfig(); g.Grpo().external(g.GrpoConfig()), r.Riskpo();"
        "assert not {'torch', 'transformers', 'trl', 'peft', 'datasets', 'reasoning_gym', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "inputs", "said"),
    [
        ({}, metas(0), "the data has no rows.*data=reasoning_gym"),
        ({}, metas(fields=["id", "text"], rows="text"), "plain text, which asks nothing"),
        ({}, metas(fields=["id", "messages"], rows="messages"), r"reward `correct` \(gym\) needs rows with `task`"),
        (
            {"max_prompt_length": 500, "max_completion_length": 100},
            metas(),
            "prompts of 500 and completions of 100 tokens exceed the model's 512 positions.*max_completion_length=12",
        ),
        (
            {"max_prompt_length": 600, "max_completion_length": 100},
            metas(),
            "at: max_prompt_length\n  do: max_prompt_length=412$",
        ),
        (
            {"max_prompt_length": 600, "max_completion_length": 600},
            metas(),
            "do: max_prompt_length=256 max_completion_length=256$",
        ),
        ({"lora": {"target_modules": ["qkv"]}}, metas(), "no layers qkv"),
    ],
)
def test_check_refuses(fields: dict[str, Any], inputs: dict[str, ArtifactMeta], said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        Grpo().check(config(**fields), inputs)


@pytest.mark.parametrize("inputs", [metas(), metas(None, rows="task"), metas(fields=["task"])])
def test_check_accepts(inputs: dict[str, ArtifactMeta]) -> None:
    Grpo().check(config(), inputs)
    Grpo().check(config(max_prompt_length=504), inputs)


def test_problems_come_together() -> None:
    with pytest.raises(RecipeError) as error:
        Grpo().check(config(max_prompt_length=600), metas(0))
    assert len(error.value.problems) == 2


def test_the_estimate_counts_tokens_and_memory() -> None:
    found = Grpo().estimate(config(max_steps=6, num_iterations=2), metas(100))
    question = 4 * (40 + 8)  # generations times a mean row and a whole completion
    assert found.tokens == 3 * 4 * question and found.data_tokens == 100 * question
    arch = metas()["model"].architecture
    assert found.parameters == found.trainable == parameter_count(arch)
    assert found.disk_bytes == 4 * parameter_count(arch)
    assert {"weights", "gradients", "optimizer", "rollout", "logits"} <= set(found.memory)
    assert all(value > 0 for value in found.memory.values())
    assert found.cache_bytes_per_token > 0
    assert any("3 roll-out batches of 4 questions x 4 completions, 2 optimiser steps each" in n for n in found.notes)


def test_the_estimate_follows_the_settings() -> None:
    def of(**fields: Any) -> Any:
        return Grpo().estimate(config(**fields), metas())

    plain = of()
    assert "reference" not in plain.memory and of(beta=0.1).memory["reference"] >= plain.memory["weights"]
    adapted = of(lora={"r": 2}, beta=0.1)
    assert "reference" not in adapted.memory
    # transformers' generate has caches but no weights of its own.
    assert 0 < adapted.memory["rollout"] < plain.memory["rollout"]
    assert adapted.trainable < plain.trainable / 4
    assert of(rollout="transformers").memory["rollout"] == adapted.memory["rollout"]
    assert "rollout" not in of(rollout="vllm_server").memory
    assert of(rollout_rows=4).memory["rollout"] < plain.memory["rollout"]
    assert of(rollout_rows=999).memory["rollout"] == plain.memory["rollout"]  # a batch has sixteen
    assert of(save_dtype="bfloat16").disk_bytes == plain.disk_bytes // 2
    assert of(trainable="mixers").trainable < plain.trainable
    assert of(max_prompt_length=20).tokens < plain.tokens


def test_without_an_architecture_only_tokens_are_known() -> None:
    found = Grpo().estimate(config(), {**metas(None), "model": ArtifactMeta("model")})
    assert found.tokens == 3 * 4 * 4 * (64 + 8) and found.data_tokens is None and not found.memory


def test_too_few_questions_are_noted() -> None:
    said = " ".join(Grpo().estimate(config(), metas(3)).notes)
    assert "the data's 3 questions are fewer than a roll-out batch has" in said
    assert "fewer" not in " ".join(Grpo().estimate(config(), metas(4)).notes)


def test_the_preset_is_accounted_for() -> None:
    def notes(**fields: Any) -> str:
        cfg = RiskpoConfig(**{**SMALL, "risk": {"bundle_size": 2}, "inputs": REFERENCES, **fields})
        return " ".join(Riskpo().notes(cfg, metas()))

    assert "preset rb: credit=rb" in notes() and "function of mean accuracy alone" in notes()
    assert "mean accuracy" not in notes(risk={"bundle_size": 2, "bundles": "stratified"})
    assert "instead of its own: loss_type=dapo" in notes(loss_type="dapo")
    assert "preset neutral" in notes(preset="neutral", risk={}) and "mean accuracy" not in notes(
        preset="neutral", risk={}
    )


def test_the_saved_type_is_what_later_stages_get() -> None:
    found = Grpo().describe(config(save_dtype="bfloat16"), metas())
    assert found["model"].extra["dtype"] == "bfloat16" and found["model"].architecture == metas()["model"].architecture
    assert found["history"].type == "history"


def key(**fields: Any) -> str:
    return key_of(key_document(Grpo(), config(**fields), 0, {}))


@pytest.mark.parametrize(
    "changed",
    [
        {"kept_completions": 9},
        {"reward_workers": 7},
        {"rollout_rows": 3},
        {"micro_batch_size": 2},
        {"save_every": 5},
        {"hang_seconds": 1.0},
    ],
)
def test_what_does_not_decide_the_result_is_not_in_the_key(changed: dict[str, Any]) -> None:
    assert key(**changed) == key()


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.9},
        {"rollout": "transformers"},
        {"rewards": {"correct": {"type": "gym", "weight": 2.0}}},
        {"rewards": {"correct": {"type": "gym", "seconds": 2.0}}},
        {"answer": {"find": "boxed"}},
        {"trl": {"vespo_k_pos": 1.0}},
        {"loss_type": "dapo"},
    ],
)
def test_what_decides_the_result_is_in_the_key(changed: dict[str, Any]) -> None:
    assert key(**changed) != key()


def test_the_versions_of_the_scorers_are_in_the_key() -> None:
    assert Grpo().external(config()) == {"rewards": {"correct": {"reasoning_gym": metadata.version("reasoning_gym")}}}
    two = config(rewards={"right": {"type": "math"}, "short": {"type": "length", "target": 1, "limit": 2}})
    assert set(Riskpo().external(two)["rewards"]) == {"right"}
    assert "math-verify" in Riskpo().external(two)["rewards"]["right"]
