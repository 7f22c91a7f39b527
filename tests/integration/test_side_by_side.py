"""Two real commands at once in one outputs folder, and a runner that is killed while another waits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from harness import (
    RUN,
    copy_store_without,
    deterministic_part,
    events,
    kill,
    posttrain,
    start,
    start_and_pause,
    step_of,
    thaw,
    wait_for,
)

STAGES = {"data", "datasets.pairs", "distill", "evaluate", "evaluate_converted", "model", "prefer", "upcycle"}


def started(outputs: Path) -> Counter[str]:
    return Counter(event["stage"] for event in events(outputs) if event["event"] == "stage_started")


def test_two_simultaneous_runs_of_a_recipe_do_the_work_once(undisturbed: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    both = [start(*RUN, cwd=tmp_path), start(*RUN, "--name", "other", cwd=tmp_path)]
    # The same run a third time: it follows the first of the two.
    both.append(start(*RUN, cwd=tmp_path))
    codes = [one.wait(timeout=300) for one in both]
    assert codes == [0, 0, 0], (tmp_path / "command.log").read_text()
    assert started(outputs) == Counter(dict.fromkeys(STAGES, 1))
    runs = sorted(outputs.glob("runs/*/run.json"))
    assert len(runs) == 2
    for run in runs:
        assert (run.parent / "report.html").exists()
        for stage in json.loads(run.read_text())["stages"]:
            assert (outputs / stage["artifact"] / "manifest.json").exists()
    assert deterministic_part(outputs, "prefer") == deterministic_part(undisturbed, "prefer")
    posttrain("verify", "all", cwd=tmp_path)
    assert not list(outputs.glob("store/*/.*")), "nothing is left over"


def test_a_run_waiting_for_anothers_stage_takes_it_over_when_that_runner_is_killed(
    undisturbed: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    first, pid = start_and_pause(*RUN, cwd=tmp_path, event=step_of("distill", 1))
    second = start(*RUN, "--name", "other", cwd=tmp_path)
    wait_for(lambda: b"waiting for that" in (tmp_path / "command.log").read_bytes(), "the second to wait")
    kill(first.pid)
    first.wait()
    thaw(pid)
    assert second.wait(timeout=120) == 0, (tmp_path / "command.log").read_text()
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")
    assert not list(outputs.glob("store/*/.*")), "nothing is left over"
