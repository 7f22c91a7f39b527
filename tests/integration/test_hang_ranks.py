"""Two ranks of which one stands still: the other notices, and the run ends with a sentence and can be resumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import copy_store_without, gone, posttrain, start_and_pause, step_of, worker_pid
from test_ranks import DISTILL, history, ranks_of


@pytest.mark.slow
def test_a_rank_that_waits_for_a_silent_one_ends_the_run(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    impatient = [*DISTILL, "stages.distill.hang_seconds=12"]
    command, _ = start_and_pause(*impatient, cwd=tmp_path, event=step_of("distill", 3))
    ranks = ranks_of(worker_pid(outputs, "distill"))
    assert command.wait(timeout=90) == 1
    said = (tmp_path / "command.log").read_text()
    assert re.search(r"rank 1 has made no progress for 1\d s \(step \d", said) and "hang_rank1.txt" in said, said
    assert "posttrain resume" in said and "Traceback" not in said
    assert all(gone(process) for process in ranks.values())
    (stacks,) = outputs.glob("store/distill/.work-*/hang_rank1.txt")
    assert "posttrain/training" in stacks.read_text()
    posttrain("resume", cwd=tmp_path)
    assert len(history(outputs, "distill")) == len(history(undisturbed, "distill"))
