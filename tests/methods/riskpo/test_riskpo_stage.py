"""The risk in the trainer: which rewards, which questions, which step; and how hard kinds of questions are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import Recorder, by_chance, make_prompts, make_trainer

from posttrain.methods.riskpo.difficulty import PassRates, kind_of
from posttrain.methods.riskpo.estimator import risk_advantages
from posttrain.methods.riskpo.quantiles import make_tracker
from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.policy.data import PROMPT, ROW

STRATIFIED = {"bundle_size": 2, "bundles": "stratified"}


class Recorded(Recorder, RiskpoTrainer):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {"risk": STRATIFIED, "max_steps": 4},
        {"risk": {**STRATIFIED, "bundles": "anti_stratified"}, "updates_per_generation": 2, "max_steps": 8},
        {"risk": STRATIFIED, "num_iterations": 2, "max_steps": 8},
        {"preset": "paper", "risk": {"bundle_size": 2}},
        {"risk": {"level": "question"}},
    ],
)
def test_advantages_are_the_estimators(settings: dict[str, Any], tmp_path: Path) -> None:
    """Done again by hand from the rewards, batch by batch: seed, roll-out number, tracker and difficulty."""
    trainer = make_trainer("riskpo", tmp_path, cls=Recorded, **settings)
    trainer.fit()
    kinds_of = {row[PROMPT]: kind_of(json.loads(row[ROW])) for row in make_prompts().rows}
    tracker, rates = make_tracker(trainer.config.risk), PassRates()
    assert len(trainer.batches) == trainer.config.rollouts >= 3
    for number, (batch, asked) in enumerate(zip(trainer.batches, trainer.reward_set.asked, strict=True)):
        scores = torch.tensor([by_chance(*one, {}, 0)["correct"] for one in asked]).view(-1, 4).double()
        kinds = [kinds_of[prompt] for prompt, _ in asked[::4]]
        wanted = risk_advantages(
            scores, trainer.config.risk, tracker, seed=3, step=number, difficulty=rates.difficulty(kinds)
        )
        rates.update(kinds, scores.mean(1))
        assert torch.equal(batch["advantages"].view(-1, 4), wanted.advantages)
    assert trainer.tracker.state_dict() == tracker.state_dict() and trainer.pass_rates.rates == rates.rates


def test_a_checkpoint_holds_the_tracker_and_the_rates(tmp_path: Path) -> None:
    trainer = make_trainer("riskpo", tmp_path, save_every=2, risk=STRATIFIED)
    trainer.fit()
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-2" / "stage_state.json").read_text())
    assert state["tracker"]["atoms"] and state["pass_rates"]["rates"] and "first" in state["rails"]
    other = make_trainer("riskpo", tmp_path / "other", risk=STRATIFIED)
    other.load_stage_state(state)
    assert json.loads(json.dumps(other.stage_state())) == state


def test_a_kind_is_as_hard_as_it_was_seen_to_be() -> None:
    rates = PassRates(decay=0.75)
    assert rates.difficulty(["a", "b"]).tolist() == [0, 0]
    rates.update(["a", "a", "b"], torch.tensor([1.0, 0.0, 0.25]))
    assert rates.rates == {"a": 0.5, "b": 0.25}
    assert rates.difficulty(["b", "a", "new"]).tolist() == [-0.25, -0.5, -0.375]
    rates.update(["a"], torch.tensor([1.0]))
    assert rates.rates == {"a": 0.75 * 0.5 + 0.25 * 1.0, "b": 0.25}


def test_what_was_not_scored_says_nothing() -> None:
    rates = PassRates()
    rates.update(["a", "a", "b"], torch.tensor([1.0, float("nan"), float("nan")]))
    assert rates.rates == {"a": 1.0}


def test_rates_survive_a_checkpoint_in_order() -> None:
    """The mean over kinds is a sum of floats, and its order decides its last bit."""
    rates = PassRates()
    rates.update(["z", "a", "m"], torch.tensor([0.1, 0.2, 0.7]))
    again = PassRates()
    again.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    assert list(again.rates.items()) == list(rates.rates.items())
    again.update(["z"], torch.tensor([1.0]))
    assert rates.rates["z"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"id": "7", "task": {"name": "sums", "difficulty": 2}}, "sums/2"),
        ({"id": "7", "task": {"name": "sums"}}, "sums/"),
        ({"id": "7", "task": {}}, "7"),
        ({"id": "7", "task": "sums"}, "7"),
        ({"id": 7}, "7"),
        ({}, ""),
    ],
)
def test_what_questions_have_in_common(row: dict[str, Any], kind: str) -> None:
    assert kind_of(row) == kind
