"""Completions without a score, shaping beside correctness, and advantages for every token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import Recorder, by_chance, column, distance, make_trainer, weights

from posttrain.methods.riskpo.trainer import RiskpoTrainer, centred, weighted
from posttrain.policy.trainer import PolicyTrainer

SHAPED: dict[str, Any] = {
    "rewards": {
        "correct": {"type": "math", "weight": 2.0},
        "short": {"type": "length", "target": 0, "limit": 8, "weight": 0.5},
    }
}
NAN = float("nan")


class RecordedGrpo(Recorder, PolicyTrainer):
    pass


class RecordedRiskpo(Recorder, RiskpoTrainer):
    pass


CLASSES = {"grpo": RecordedGrpo, "riskpo": RecordedRiskpo, "neutral": RecordedRiskpo}


def asked(trainer: Any, row: dict[str, Any]) -> str:
    """The prompt of a row that the loader gives."""
    return trainer.prompts.rows[row["question"]]["prompt"]


def trained(kind: str, folder: Path, score: Any, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    trainer = make_trainer(kind, folder, score=score, cls=CLASSES[kind], **settings)
    return trainer, trainer.fit()


def both(prompt: str, completion: str, row: dict[str, Any], length: int) -> dict[str, float | None]:
    return {**by_chance(prompt, completion, row, length), "short": -length / 8}


def some_unknown(prompt: str, completion: str, row: dict[str, Any], length: int) -> dict[str, float | None]:
    """None for completions of odd length, and for all of the question 3 of 12."""
    unknown = length % 2 == 1 or row["id"] == "3"
    return {"correct": None if unknown else by_chance(prompt, completion, row, length)["correct"]}


@pytest.mark.parametrize("kind", CLASSES)
def test_what_cannot_be_scored_has_no_advantage(kind: str, tmp_path: Path) -> None:
    trainer, history = trained(kind, tmp_path, some_unknown)
    alone = 0
    for batch, (ids, _) in zip(trainer.batches, trainer.written, strict=True):
        advantages = batch["advantages"].view(-1, 4)
        unknown = torch.tensor([len(one) % 2 == 1 for one in ids]).view(-1, 4)
        unknown[[asked(trainer, row).startswith("q3 ") for row in batch["inputs"][::4]]] = True
        assert not advantages[unknown].any()
        alone += int((unknown.sum(1) == 3).sum())
        assert not advantages[unknown.sum(1) >= 3].any()  # one score has nothing to be compared with
    assert alone > 0 and all(math.isfinite(loss) for loss in column(history, "loss"))
    assert max(column(history, "grad_norm")) > 0.01


@pytest.mark.parametrize("kind", CLASSES)
def test_a_batch_without_any_score_changes_nothing(kind: str, tmp_path: Path) -> None:
    trainer, history = trained(kind, tmp_path, lambda *asked: {"correct": None}, max_steps=2)
    assert column(history, "grad_norm") == [0, 0] and column(history, "reward") == [None, None]
    assert not any(batch["advantages"].any() for batch in trainer.batches)
    if kind != "grpo":
        assert column(history, "risk/nan_share") == [1, 1]


@pytest.mark.parametrize("kind", ["grpo", "riskpo"])
def test_how_an_answer_is_written_does_not_decide_where_nothing_judges_it(kind: str, tmp_path: Path) -> None:
    """The length's reward has a score for every completion; correctness has none for the question 3."""

    def score(prompt: str, completion: str, row: dict[str, Any], length: int) -> dict[str, float | None]:
        found = both(prompt, completion, row, length)
        return found | ({"correct": None} if row["id"] == "3" else {})

    trainer, _ = trained(kind, tmp_path, score, **SHAPED)
    seen = 0
    for batch in trainer.batches:
        of_three = torch.tensor([asked(trainer, row).startswith("q3 ") for row in batch["inputs"]])
        seen += int(of_three.sum())
        assert not batch["advantages"][of_three].any() and batch["advantages"][~of_three].any()
    assert seen == 4


def test_shaping_is_added_to_the_risk_centred_in_its_group(tmp_path: Path) -> None:
    shaped, _ = trained("riskpo", tmp_path / "shaped", both, max_steps=1, **SHAPED)
    only = {"rewards": {"correct": {"type": "math", "weight": 2.0}}}
    plain, _ = trained("riskpo", tmp_path / "plain", by_chance, max_steps=1, **only)
    lengths = torch.tensor([len(ids) for ids in shaped.written[0][0]]).view(-1, 4).double()
    added = 0.5 * -(lengths - lengths.mean(1, keepdim=True)) / 8
    found = shaped.batches[0]["advantages"] - plain.batches[0]["advantages"]
    assert torch.allclose(found.view(-1, 4).double(), added, atol=1e-6) and added.abs().max() > 0.05
    assert plain.batches[0]["advantages"].any()


def test_the_risk_is_taken_of_the_named_reward(tmp_path: Path) -> None:
    """The weighted score: the tracker's atoms are sums of two scores of the named reward alone."""
    trainer, _ = trained("riskpo", tmp_path, both, max_steps=1, risk_reward="short", **SHAPED)
    assert (trainer.columns, trainer.shaping) == ([1], [0])
    atoms = trainer.tracker.atoms * 16  # 0.5 of a length in eighths
    assert torch.allclose(atoms, atoms.round(), atol=1e-6) and atoms.max() < 0
    assert (atoms.round() % 2 != 0).any()  # without its weight they would all be even


def test_weighted_and_centred() -> None:
    scores = torch.tensor([[[1.0, 2.0], [NAN, 4.0], [NAN, NAN]]]).double()
    total = weighted(scores, torch.tensor([2.0, 0.5]).double())
    assert total[0, :2].tolist() == [3.0, 2.0] and total[0, 2].isnan()
    assert centred(total).tolist() == [[0.5, -0.5, 0.0]]
    assert centred(torch.full((1, 2), NAN)).tolist() == [[0.0, 0.0]]


class SameForAllTokens(RecordedGrpo):
    """The advantages of a completion for every one of its tokens, and nonsense behind its end."""

    def advantages_of(self, rewards: torch.Tensor) -> torch.Tensor:
        groups = rewards[:, 0].view(-1, self.num_generations)
        each = (groups - groups.mean(1, keepdim=True)).flatten()[:, None]
        tokens = torch.arange(int(self.lengths.max()))
        return torch.where(tokens < self.lengths[:, None], each, 1e3)


class SameForAll(RecordedGrpo):
    def advantages_of(self, rewards: torch.Tensor) -> torch.Tensor:
        return SameForAllTokens.advantages_of(self, rewards)[:, 0]


class FirstTokenOnly(RecordedGrpo):
    def advantages_of(self, rewards: torch.Tensor) -> torch.Tensor:
        every = SameForAllTokens.advantages_of(self, rewards)
        every[:, 1:] = 0
        return every


@pytest.mark.parametrize("loss", ["grpo", "dapo", "cispo"])
def test_advantages_for_every_token(loss: str, tmp_path: Path) -> None:
    settings = {"loss_type": loss, "adam_epsilon": 1e-3, "updates_per_generation": 2, "max_steps": 4}
    runs = {
        cls: make_trainer("grpo", tmp_path / cls.__name__, cls=cls, **settings)
        for cls in (SameForAll, SameForAllTokens)
    }
    (one, other), histories = runs.values(), [trainer.fit() for trainer in runs.values()]
    assert other.micro[0]["advantages"].shape == other.micro[0]["completion_mask"].shape
    assert one.micro[0]["advantages"].dim() == 1
    assert column(histories[1], "loss") == pytest.approx(column(histories[0], "loss"), rel=1e-5, abs=1e-6)
    assert distance(weights(one), weights(other)) < 1e-6
    logs = [(trainer.ctx.work_dir / "completions.jsonl").read_text().splitlines() for trainer in (one, other)]
    for row, its in zip(*([json.loads(line) for line in log] for log in logs), strict=True):
        assert row.pop("advantage") == pytest.approx(its.pop("advantage"), abs=1e-6) and row == its


def test_a_tokens_advantage_is_its_own(tmp_path: Path) -> None:
    every, first = (
        make_trainer("grpo", tmp_path / cls.__name__, cls=cls, max_steps=1)
        for cls in (SameForAllTokens, FirstTokenOnly)
    )
    norms = [trainer.fit()[0]["grad_norm"] for trainer in (every, first)]
    assert norms[0] != pytest.approx(norms[1], rel=0.05) and norms[1] > 0.01
    # In the log a completion has the mean of its tokens.
    logged = torch.tensor(list(first._logs["advantages"]))
    assert torch.allclose(logged * first.lengths, torch.tensor(list(every._logs["advantages"])), atol=1e-6)


def test_every_score_is_progress(tmp_path: Path) -> None:
    """A batch may take longer to score than `hang_seconds`, as long as scores come in."""
    beats: list[str] = []
    trainer = make_trainer("grpo", tmp_path, max_steps=1)
    score, trainer.watchdog.beat = trainer.reward_set.score, beats.append

    def slow(*asked: Any, at_score: Any) -> Any:
        for _ in range(3):
            at_score()
        return score(*asked)

    trainer.reward_set.score = slow
    trainer.fit()
    assert beats.count("scoring for step 1") >= 3
