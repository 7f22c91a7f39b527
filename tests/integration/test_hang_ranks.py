"""Two ranks of which one stands still: the other notices, and the run ends with a sentence and can be resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import copy_store_without, freeze_when, gone, has_event, posttrain, start, wait_for, worker_pid
from test_ranks import DISTILL, history, ranks_of


@pytest.mark.slow
def test_a_rank_that_waits_for_a_silent_one_ends_the_run(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    command = start(*DISTILL, "stages.distill.hang_seconds=12", cwd=tmp_path)
    wait_for(lambda: has_event(outputs, "stage_started", "distill"), "the worker")
    pid = worker_pid(outputs, "distill")
    wait_for(lambda: len(ranks_of(pid)) == 2, "the ranks")
    ranks = ranks_of(pid)
    freeze_when(ranks[0], lambda: has_event(outputs, "metrics", "distill", step=3), "the third step")
    assert command.wait(timeout=90) == 1
    said = (tmp_path / "command.log").read_text()
    assert re.search(r"rank 1 has made no progress for 1\d s \(step \d", said) and "hang_rank1.txt" in said, said
    assert "posttrain resume" in said and "Traceback" not in said
    assert all(gone(process) for process in ranks.values())
    (stacks,) = outputs.glob("store/distill/.work-*/hang_rank1.txt")
    assert "posttrain/training" in stacks.read_text()
    posttrain("resume", cwd=tmp_path)
    assert len(history(outputs, "distill")) == len(history(undisturbed, "distill"))
