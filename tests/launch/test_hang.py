"""A stage whose main thread stands still ends by its watchdog, in a real worker process, and goes on afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from toy_stages import toy_recipe

from posttrain.errors import EXIT_DONE, EXIT_FAILED
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.runner import plan_and_run


def run(**settings):
    return plan_and_run(lambda: make_plan(toy_recipe(**settings)), None, yes=True)


def test_a_worker_that_hangs_is_ended_and_says_where_it_stood():
    hung = run(fail="hang")
    assert hung.exit_code == EXIT_FAILED
    (work_dir,) = Path("outputs/store/toy_train").glob(".work-*")
    outcome = json.loads((work_dir / "outcome.json").read_text())
    assert outcome["status"] == "failed" and "Traceback" not in hung.message
    for said in (outcome["message"], hung.message):
        assert "rank 0 has made no progress for" in said and "(step 6)" in said
        assert f"{work_dir.resolve()}/hang_rank0.txt" in said and "stages.train.hang_seconds=2" in said
    stacks = (work_dir / "hang_rank0.txt").read_text()
    assert "toy_stages.py" in stacks and "in wait" in stacks and "watchdog.py" in stacks
    assert stacks.count("hread 0x") >= 2
    assert run(frame={"run": {"name": "repaired"}}).exit_code == EXIT_DONE
