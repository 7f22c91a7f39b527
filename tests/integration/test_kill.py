"""Kill -9 of worker or runner at any moment, then `resume`: the result is the undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    RUN,
    copy_store_without,
    deterministic_part,
    freeze_when,
    gone,
    has_event,
    inside_a_checkpoint_save,
    kill,
    posttrain,
    start,
    thaw,
    wait_for,
    worker_pid,
)


def _a_complete_checkpoint(outputs: Path) -> bool:
    return any(outputs.glob("store/distill/.work-*/checkpoints/checkpoint-*/COMPLETE"))


MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "before training": ("distill", lambda outputs: has_event(outputs, "stage_started", "distill")),
    "after the first step": ("distill", lambda outputs: has_event(outputs, "metrics", "distill", step=1)),
    "inside a checkpoint save": ("distill", inside_a_checkpoint_save),
    "after a checkpoint": ("distill", _a_complete_checkpoint),
    "between two documents": ("evaluate", lambda outputs: has_event(outputs, "progress", "evaluate", done=1)),
}


@pytest.mark.parametrize("victim", ["worker", "runner"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(moment: str, victim: str, undisturbed: Path, tmp_path: Path) -> None:
    stage, reached = MOMENTS[moment]
    outputs = tmp_path / "outputs"
    # All that the killed stage does not decide comes from the store; the evaluations' key is known before they run.
    copy_store_without(undisturbed, outputs, stage)

    runner = start(*RUN, cwd=tmp_path)
    wait_for(lambda: has_event(outputs, "stage_started", stage), "the worker")
    pid = worker_pid(outputs, stage)
    freeze_when(pid, lambda: reached(outputs), moment)
    kill(pid if victim == "worker" else runner.pid)
    thaw(pid)
    assert runner.wait(timeout=60) != 0
    posttrain("resume", cwd=tmp_path)

    assert deterministic_part(outputs, stage) == deterministic_part(undisturbed, stage)
    posttrain("verify", "all", cwd=tmp_path)
    assert not list(outputs.glob("store/*/.work-*"))


def test_the_worker_ends_with_its_runner(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    runner = start(*RUN, cwd=tmp_path)
    wait_for(lambda: has_event(outputs, "stage_started", "distill"), "the start of training")
    pid = worker_pid(outputs, "distill")
    kill(runner.pid)
    runner.wait()
    wait_for(lambda: gone(pid), "the worker's end", seconds=30)
