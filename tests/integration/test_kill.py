"""Kill -9 of worker or runner at any moment, then `resume`: the result is the undisturbed one, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    RUN,
    copy_store_without,
    deterministic_part,
    gone,
    has_event,
    kill,
    posttrain,
    start,
    wait_for,
    worker_pid,
)


def _inside_a_checkpoint_save(outputs: Path) -> bool:
    folders = list(outputs.glob("store/distill/.work-*/checkpoints/checkpoint-*"))
    return any(not (folder / "COMPLETE").exists() for folder in folders)


def _a_complete_checkpoint(outputs: Path) -> bool:
    return any(outputs.glob("store/distill/.work-*/checkpoints/checkpoint-*/COMPLETE"))


MOMENTS: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "at the start of training": ("distill", lambda outputs: has_event(outputs, "stage_started", "distill")),
    "after the first step": ("distill", lambda outputs: has_event(outputs, "metrics", "distill", step=1)),
    "inside a checkpoint save": ("distill", _inside_a_checkpoint_save),
    "after a checkpoint": ("distill", _a_complete_checkpoint),
    "in the last evaluation": ("evaluate", lambda outputs: has_event(outputs, "stage_started", "evaluate")),
}


@pytest.mark.parametrize("victim", ["worker", "runner"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(moment: str, victim: str, undisturbed: Path, tmp_path: Path) -> None:
    stage, reached = MOMENTS[moment]
    outputs = tmp_path / "outputs"
    # The stages before training are the same in every case: start from their artifacts.
    copy_store_without(undisturbed, outputs, "distill", "evaluate")

    runner = start(*RUN, cwd=tmp_path)
    wait_for(lambda: reached(outputs), moment)
    pid = worker_pid(outputs, stage)
    kill(pid if victim == "worker" else runner.pid)
    assert runner.wait(timeout=60) != 0
    if moment == "inside a checkpoint save":
        wait_for(lambda: gone(pid), "the worker's end") if victim == "runner" else None
    posttrain("resume", cwd=tmp_path)

    for name in ("distill", "evaluate"):
        assert deterministic_part(outputs, name) == deterministic_part(undisturbed, name)
    posttrain("verify", "all", cwd=tmp_path)
    assert not list(outputs.glob("store/*/.work-*"))


def test_the_worker_ends_with_its_runner(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill", "evaluate")
    runner = start(*RUN, cwd=tmp_path)
    wait_for(lambda: has_event(outputs, "stage_started", "distill"), "the start of training")
    pid = worker_pid(outputs, "distill")
    kill(runner.pid)
    runner.wait()
    wait_for(lambda: gone(pid), "the worker's end", seconds=30)
