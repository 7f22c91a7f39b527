"""One optimiser step whatever the forward pass holds, and several steps of one roll-out batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import (
    Recorder,
    asked_rows,
    by_chance,
    column,
    distance,
    make_policy,
    make_prompts,
    make_trainer,
    weights,
)

from posttrain.policy.trainer import PolicyTrainer

LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
STEADY = {"adam_epsilon": 1e-3}


class RecordedGrpo(Recorder, PolicyTrainer):
    pass


def trained(folder: Path, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    trainer = make_trainer("grpo", folder, cls=RecordedGrpo, **{**STEADY, **settings})
    return trainer, trainer.fit()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_micro_batch_does_not_change_the_step(loss: str, tmp_path: Path) -> None:
    settings = {"loss_type": loss, "max_steps": 2, "updates_per_generation": 2, "epsilon_high": 1.0}
    runs = [trained(tmp_path / str(size), micro_batch_size=size, **settings) for size in (2, 4, 8)]
    assert [len(trainer.micro) for trainer, _ in runs] == [8, 4, 2]
    first, history = runs[-1]
    for trainer, other in runs[:-1]:
        assert column(other, "loss") == pytest.approx(column(history, "loss"), rel=1e-5, abs=1e-6)
        assert column(other, "grad_norm") == pytest.approx(column(history, "grad_norm"), rel=1e-4)
        assert distance(weights(trainer), weights(first)) < 1e-5


def test_completions_of_like_length_share_a_forward_pass(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, micro_batch_size=4, max_steps=1)
    spans = [part["completion_mask"].sum(1) for part in trainer.micro]
    assert len(spans) == 4
    prompts = [len(ids) for ids in trainer.prompts.ids.values()]
    slack = max(prompts) - min(prompts)
    for shorter, longer in zip(spans, spans[1:], strict=False):
        assert int(shorter.max()) <= int(longer.min()) + slack


def steps_that_wrote(trainer: Any) -> list[int]:
    return [batch["step"] for batch in trainer.batches]


def test_updates_and_iterations_of_one_batch(tmp_path: Path) -> None:
    trainer, history = trained(
        tmp_path, updates_per_generation=2, num_iterations=2, max_steps=8, lr=3e-2, micro_batch_size=8
    )
    assert steps_that_wrote(trainer) == [0, 4] and len(history) == 8
    assert [name in row for row in history for name in ("reward", "rollout/logprob_gap")] == (
        [True] * 2 + [False] * 6
    ) * 2
    used = [part["completion_ids"] for part in trainer.micro]
    halves = [torch.cat([used[0], used[1]]), torch.cat([used[2], used[3]])]
    assert torch.equal(halves[0], halves[1]) and not torch.equal(used[0], used[1])
    assert sorted(halves[0].tolist()) == sorted(trainer.batches[0]["completion_ids"].tolist())
    # The first step is made by the policy that wrote; the others are off it.
    clipped = column(history, "clip_ratio/region_mean")
    assert clipped[0] == clipped[4] == 0 and min(clipped[1:4]) > 0


def test_every_batch_is_written_by_the_policy_of_its_step(tmp_path: Path) -> None:
    """Log-probabilities of the sampler are the trainer's, whatever was learnt in between."""
    _, history = trained(tmp_path, lr=3e-2, num_iterations=2, max_steps=6)
    gaps = [row["rollout/logprob_gap_max"] for row in history if "rollout/logprob_gap_max" in row]
    assert len(gaps) == 3 and max(gaps) < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_loss_is_taken_at_the_samplers_temperature(temperature: float, tmp_path: Path) -> None:
    _, history = trained(tmp_path, temperature=temperature, max_steps=1)
    assert history[0]["rollout/logprob_gap_max"] < 1e-4


@pytest.mark.parametrize("more", [{}, {"num_iterations": 2, "updates_per_generation": 2, "max_steps": 12}])
def test_questions_come_in_the_order_of_the_run(more: dict[str, Any], tmp_path: Path) -> None:
    """Twelve questions are three batches of four; each question is asked `num_generations` times in a row."""
    trainer, _ = trained(tmp_path, **more)
    asked = [[trainer.prompts.rows[row["question"]]["prompt"] for row in batch["inputs"]] for batch in trainer.batches]
    groups = [batch[start : start + 4] for batch in asked for start in range(0, 16, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert [group[0] for group in groups] == list(asked_rows(trainer)["prompt"])
    assert {group[0] for group in groups} == set(make_prompts().ids) and len(groups) == 12


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_whose_completions_were_all_cut_off_changes_nothing(loss: str, tmp_path: Path) -> None:
    model = make_policy()
    model.generation_config.eos_token_id = 257
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 1}
    trainer = make_trainer("grpo", tmp_path, model=model, loss_type=loss, **settings)
    (row,) = trainer.fit()
    assert (row["completions/clipped_ratio"], row["loss"], row["grad_norm"]) == (1.0, 0.0, 0.0)
    assert distance(before, weights(trainer)) == 0


def test_who_shares_an_update_does_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    """A reward that draws random numbers, as a way to generate may."""

    def drawing(*asked: Any) -> dict[str, float | None]:
        torch.rand(7)
        return by_chance(*asked)

    settings = {"updates_per_generation": 2, "max_steps": 2}
    (one, history), (other, its) = (
        trained(tmp_path / score.__name__, score=score, **settings) for score in (by_chance, drawing)
    )
    assert history == its and distance(weights(one), weights(other)) == 0
