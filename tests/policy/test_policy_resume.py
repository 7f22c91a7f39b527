"""Interrupted at any moment and resumed, a run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import by_chance, distance, make_trainer, weights

from posttrain.errors import StopRequested
from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.policy.completions import FILE

STRATIFIED = {"risk": {"bundle_size": 2, "bundles": "stratified"}, "kept_completions": 3}
CYCLE = {"updates_per_generation": 2, "num_iterations": 2, "max_steps": 12}
"""Four steps of a roll-out batch."""


class Killed(BaseException):
    """Stands for a signal that nothing can catch."""


def stop(trainer: Any) -> None:
    (trainer.ctx.work_dir / "STOP").touch()


def die(trainer: Any) -> None:
    raise Killed


class Disturbed(RiskpoTrainer):
    """Calls `disturb` before its `moment`-th look for a wish to stop: a roll-out has one, and each of its waves."""

    moment, looks = 0, 0
    disturb: Callable[[Any], None] = staticmethod(stop)

    def _stop_if_asked(self) -> None:
        self.looks += 1
        if self.looks == self.moment:
            type(self).disturb(self)
        super()._stop_if_asked()


def end_state(trainer: Any, history: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "history": history,
        "tracker": trainer.tracker.state_dict(),
        "pass rates": list(trainer.pass_rates.rates.items()),
        "rails": json.dumps(trainer.rails.state()),
        "completions": (trainer.ctx.work_dir / FILE).read_bytes(),
        "optimiser": [value for one in trainer.optimizer.state_dict()["state"].values() for value in one.values()],
    }


def assert_same(one: Any, history: list[dict[str, Any]], other: Any, its_history: list[dict[str, Any]]) -> None:
    mine, its = end_state(one, history), end_state(other, its_history)
    for first, second in zip(mine.pop("optimiser"), its.pop("optimiser"), strict=True):
        assert torch.equal(first, second)
    assert mine == its
    assert distance(weights(one), weights(other)) == 0


def resumed(folder: Path, **settings: Any) -> tuple[Any, list[dict[str, Any]]]:
    (folder / "STOP").unlink(missing_ok=True)
    trainer = make_trainer("riskpo", folder, **settings)
    return trainer, trainer.fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, list[dict[str, Any]]]]:
    """Undisturbed runs, made once for all tests with the same settings."""
    made: dict[str, Any] = {}

    def make(**settings: Any) -> tuple[Any, list[dict[str, Any]]]:
        key = json.dumps(settings)
        if key not in made:
            trainer = make_trainer("riskpo", tmp_path_factory.mktemp("whole"), **settings)
            made[key] = trainer, trainer.fit()
        return made[key]

    return make


def interrupted(folder: Path, moment: int, disturb: Callable[[Any], None], **settings: Any) -> Any:
    cls = type("Once", (Disturbed,), {"moment": moment, "disturb": staticmethod(disturb)})
    return make_trainer("riskpo", folder, cls=cls, **settings)


@pytest.mark.parametrize(("moment", "found_at"), [(1, 0), (3, 0), (4, 1), (6, 1), (9, 2)])
def test_a_stop_during_a_roll_out_keeps_the_last_steps_state(
    moment: int, found_at: int, tmp_path: Path, whole: Any
) -> None:
    """Before the first wave of a roll-out, between two waves, and with nothing done yet."""
    settings = {**STRATIFIED, "max_steps": 5, "rollout_rows": 8}
    first = interrupted(tmp_path, moment, stop, **settings)
    with pytest.raises(StopRequested) as stopped:
        first.fit()
    assert stopped.value.step == found_at == first.state.global_step
    kept = list((tmp_path / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in kept] == ([f"checkpoint-{found_at}"] if found_at else [])
    assert_same(*resumed(tmp_path, **settings), *whole(**settings))


def test_a_stop_at_the_end_of_a_step(tmp_path: Path, whole: Any) -> None:
    """Seen after completions were written, so that the step is made first."""
    settings = {**STRATIFIED, "max_steps": 5, "rollout_rows": 8}

    def score(*asked: Any) -> dict[str, float | None]:
        if len(first.reward_set.asked) == 3:
            stop(first)
        return by_chance(*asked)

    first = make_trainer("riskpo", tmp_path, score=score, **settings)
    with pytest.raises(StopRequested) as stopped:
        first.fit()
    assert stopped.value.step == 3
    assert_same(*resumed(tmp_path, **settings), *whole(**settings))


def test_a_kill_repeats_what_came_after_the_checkpoint(tmp_path: Path, whole: Any) -> None:
    """Step 3 was made and its completions were logged, but the newest checkpoint is that of step 2."""
    settings = {**STRATIFIED, "max_steps": 5, "rollout_rows": 8}
    first = interrupted(tmp_path, 11, die, save_every=2, **settings)
    with pytest.raises(Killed):
        first.fit()
    assert first.state.global_step == 3
    lines = (tmp_path / FILE).read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {0, 1, 2}
    (tmp_path / FILE).write_text("\n".join(lines) + '\n{"step": 1, "prom')
    again = resumed(tmp_path, save_every=2, **settings)
    assert_same(*again, *whole(**settings))


def test_completions_in_use_are_never_left_in_the_middle(tmp_path: Path, whole: Any) -> None:
    """A stop and a checkpoint that come due inside a cycle of four steps wait for its end."""
    settings = {**STRATIFIED, **CYCLE}
    first = make_trainer("riskpo", tmp_path, save_every=3, **settings)
    saved = saves(first)
    first.ctx.emit = lambda event, fields: stop(first) if fields.get("step") == 5 else None
    with pytest.raises(StopRequested) as stopped:
        first.fit()
    assert (stopped.value.step, saved) == (8, [4, 8])
    assert_same(*resumed(tmp_path, save_every=3, **settings), *whole(**settings))


def saves(trainer: Any) -> list[int]:
    """Steps after which the trainer will have saved, filled while it trains."""
    found: list[int] = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (found.append(trainer.state.global_step), save(*args))
    return found


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"save_every": 2, "max_steps": 5}, [2, 4]),
        ({"save_every": 3, "num_iterations": 2, "max_steps": 12}, [4, 6, 10]),  # due at 3, 6 and 9; 12 is the end
        ({"save_every": 0, "max_steps": 2}, []),
    ],
)
def test_checkpoints_are_written_when_due_and_not_oftener(
    settings: dict[str, Any], wanted: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer("riskpo", tmp_path, **settings)
    found = saves(trainer)
    trainer.fit()
    assert found == wanted


def test_a_kill_inside_a_cycle(tmp_path: Path, whole: Any) -> None:
    settings = {**STRATIFIED, **CYCLE}
    first = make_trainer("riskpo", tmp_path, save_every=3, **settings)

    def killed_at(event: str, fields: dict[str, Any]) -> None:
        if event == "metrics" and fields["step"] == 7:
            raise Killed

    first.ctx.emit = killed_at
    with pytest.raises(Killed):
        first.fit()
    assert_same(*resumed(tmp_path, save_every=3, **settings), *whole(**settings))


def test_what_is_resumed_was_in_use(whole: Any) -> None:
    """Without pass rates and a tracker with a history the tests above would show nothing about them."""
    trainer, history = whole(**STRATIFIED, max_steps=5, rollout_rows=8)
    assert len(trainer.pass_rates.rates) == 7 and len(set(trainer.pass_rates.rates.values())) > 3
    assert len(trainer.tracker.atoms) > 2 and not history[-1]["risk/quantiles_from_batch"]
    assert trainer.rails.state()["first"]["entropy"] == history[0]["entropy"]
