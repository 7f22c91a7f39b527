"""Kill -9 of worker or runner at any moment, then `resume`: the result is the undisturbed one, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    start_and_pause,
    step_of,
    thaw,
    wait_for,
    worker_pid,
)

MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "before training": ("distill", {"opening": "*/store/mla_upcycle/*/model/config.json"}),
    "after the first step": ("distill", {"event": step_of("distill", 1)}),
    "inside a checkpoint save": ("distill", {"opening": "*/checkpoints/checkpoint-2/*COMPLETE*"}),
    "after a checkpoint": ("distill", {"event": step_of("distill", 3)}),
    "between two documents": ("evaluate", {"event": {"event": "progress", "stage": "evaluate", "done": 1}}),
}


@pytest.mark.parametrize("victim", ["worker", "runner"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_undisturbed(moment: str, victim: str, undisturbed: Path, tmp_path: Path) -> None:
    stage, at = MOMENTS[moment]
    outputs = tmp_path / "outputs"
    # All that the killed stage does not decide comes from the store; the evaluations' key is known before they run.
    copy_store_without(undisturbed, outputs, stage)

    runner, pid = start_and_pause(*RUN, cwd=tmp_path, **at)
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
