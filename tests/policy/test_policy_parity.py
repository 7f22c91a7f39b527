"""Ours against TRL's own trainer, on the same completions: losses, gradient norms and weights, for every loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from policy_world import SMALL, Recorder, asked_rows, by_chance, column, distance, make_policy, make_trainer, weights

from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.models.loading import load_model, save_model
from posttrain.models.tiny import tiny_tokenizer
from posttrain.policy.trainer import PolicyTrainer

STEADY = {"adam_epsilon": 1e-3}
"""Adam divides by it: a gradient that is nothing but rounding moves nothing."""


class RecordedGrpo(Recorder, PolicyTrainer):
    pass


class RecordedRiskpo(Recorder, RiskpoTrainer):
    pass


def stock(ours: Any, folder: Path, model: Any, **changes: Any) -> Any:
    """`trl.GRPOTrainer` itself, given what ours asked and wrote; a step is one forward pass."""
    config = ours.config
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=3,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        shuffle_dataset=False,
        optim="adamw_torch_fused",
        lr_scheduler_type="constant",
        weight_decay=0.0,
        learning_rate=config.lr,
        adam_epsilon=config.adam_epsilon,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.generation_batch_size,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        **changes,
    )

    def correct(prompts: Any, completions: Any, row: Any, **_: Any) -> list[float]:
        rows = [json.loads(one) for one in row]
        asked = zip(prompts, completions, rows, strict=True)
        return [ours.reward_set.of(prompt, text, one, len(text))["correct"] for prompt, text, one in asked]

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=correct,
        args=arguments,
        train_dataset=asked_rows(ours),
        processing_class=tiny_tokenizer(),
    )
    written, compute = iter(ours.written), trainer.compute_loss
    trainer.losses = []

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = compute(*args, **kwargs)
        trainer.losses.append(float(loss.detach()))
        return loss

    trainer._generate_single_turn = lambda *args, **kwargs: next(written)
    trainer.compute_loss = compute_loss
    return trainer


def assert_equal(
    kind: str, folder: Path, ours: dict[str, Any], theirs: dict[str, Any], model: Any = make_policy
) -> Any:
    cls = RecordedRiskpo if kind == "neutral" else RecordedGrpo
    one = make_trainer(kind, folder / "ours", model=model(), cls=cls, **{**STEADY, **ours})
    history = one.fit()
    other = stock(one, folder / "stock", model(), **theirs)
    before = weights(other)
    other.train()
    logged = [entry for entry in other.state.log_history if "grad_norm" in entry]
    assert len(other.losses) == len(history) == SMALL["max_steps"]
    assert column(history, "loss") == pytest.approx(other.losses, rel=1e-5, abs=1e-6)
    assert column(history, "grad_norm") == pytest.approx(column(logged, "grad_norm"), rel=1e-4)
    assert min(column(history, "grad_norm")) > 0.01
    assert distance(before, weights(other)) > 1e-3
    assert distance(weights(one), weights(other)) < 1e-5
    return one, history, logged


def test_the_neutral_preset_is_grpo(tmp_path: Path) -> None:
    ours, history, logged = assert_equal("neutral", tmp_path, {}, {"loss_type": "grpo"})
    assert len({length for ids, _ in ours.written for length in map(len, ids)}) > 3  # completions of many lengths
    for name in ("reward", "reward_std", "frac_reward_zero_std", "completions/mean_length"):
        assert column(history, name) == pytest.approx(column(logged, name), rel=1e-6), name


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "luspo"])
def test_every_loss_is_trls(loss: str, tmp_path: Path) -> None:
    chosen = {"loss_type": loss, **({"epsilon_high": 5.0} if loss == "cispo" else {})}
    assert_equal("grpo", tmp_path, chosen, chosen)


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_rewards_are_scaled_as_trl_does(scale: str, tmp_path: Path) -> None:
    chosen = {"scale_rewards": scale, "loss_type": "dapo"}
    assert_equal("grpo", tmp_path, chosen, chosen)


@pytest.mark.parametrize("loss", ["grpo", "bnpo"])
def test_completions_that_were_cut_off_teach_nothing(loss: str, tmp_path: Path) -> None:
    chosen = {"mask_truncated_completions": True, "loss_type": loss}
    ours, *_ = assert_equal("grpo", tmp_path, {**chosen, "max_completion_length": 4}, chosen)
    masked = torch.cat([part["completion_mask"].sum(1) == 0 for part in ours.micro])
    assert 0.2 < masked.double().mean() < 0.8


def test_with_a_reference_model(tmp_path: Path) -> None:
    save_model(make_policy(), tiny_tokenizer(), tmp_path / "model")

    def load() -> Any:
        model = load_model(tmp_path / "model", dtype=torch.float32)
        model.generation_config.eos_token_id = make_policy().generation_config.eos_token_id
        return model

    _, history, _ = assert_equal("grpo", tmp_path, {"beta": 0.3}, {"beta": 0.3, "loss_type": "grpo"}, load)
    assert column(history, "kl")[0] == pytest.approx(0, abs=1e-6) and min(column(history, "kl")[1:]) > 1e-4


def test_the_rewards_are_not_all_alike() -> None:
    assert {by_chance("a", str(number), {}, 1)["correct"] for number in range(20)} == {0.0, 1.0}
