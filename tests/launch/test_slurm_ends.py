"""How a stage's job ends when not all goes well: steps that are left, ranks that Slurm ended, others that wait."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from submitted_runs import SLURM, kinds, recipe, submitted, when
from toy_stages import ToyTrain

from posttrain.launch import local
from posttrain.launch.job import CLAIM
from posttrain.launch.slurm import stage_job
from posttrain.launch.slurm.commands import steps_of
from posttrain.launch.slurm.stage_job import end_steps
from posttrain.launch.slurm.submit import submit
from posttrain.launch.slurm.sweep import submit_sweep
from posttrain.pipeline.lock import Lock
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage_runner import Quiet

STEPS = ("102.0", "102.1", "102.batch", "102.extern")


@pytest.fixture
def said() -> list[str]:
    return []


# ---- steps


def test_the_batch_script_is_no_step(slurm):
    slurm.start_steps(*STEPS, "103.0")
    assert steps_of("102") == ["102.0", "102.1"]


def test_steps_are_killed_one_by_one_and_the_job_goes_on(slurm, said):
    slurm.set("102", "RUNNING")
    slurm.start_steps(*STEPS)
    end_steps("102", said.append)
    (call,) = slurm.named("scancel")
    assert "--signal=KILL" in call and [word for word in call if not word.startswith("-")] == ["102.0", "102.1"]
    assert slurm.steps == ["102.batch", "102.extern"] and slurm.state("102") == "RUNNING" and said == []


def test_a_job_without_steps_is_left_alone(slurm, said):
    slurm.start_steps("102.batch")
    end_steps("102", said.append)
    assert slurm.named("scancel") == [] and said == []


def test_steps_that_do_not_end_are_given_up(slurm, said, monkeypatch):
    monkeypatch.setattr(stage_job, "STEP_SECONDS", 4.0)
    slurm.start_steps("102.0", endless=True)
    slurm.start_steps("102.1")
    began = time.monotonic()
    end_steps("102", said.append)
    assert said == ["steps 102.0 do not end"] and time.monotonic() - began >= 4.0
    assert len(slurm.named("scancel")) >= 2, "they are killed again and again until then"


@pytest.mark.parametrize("command", ["squeue", "scancel"])
def test_errors_of_slurm_are_told(slurm, said, monkeypatch, command):
    # A command that fails is tried again for a while, which takes longer than this test may.
    hurried = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: 20.0 * hurried())
    slurm.start_steps("102.0")
    slurm.refuse(command)
    end_steps("102", said.append)
    (line,) = said
    assert line.startswith("steps of job 102 could not be ended:") and f"{command} failed: {command}: error" in line


# ---- what the worker left


def worker(monkeypatch, source: str) -> None:
    """Have the worker of a stage be a small program, which gets the work folder."""
    ending = f"import json, os, sys, time\nfrom pathlib import Path\nwork = Path(sys.argv[1])\n{source}"
    monkeypatch.setattr(local, "worker_command", lambda work_dir: [sys.executable, "-c", ending, str(work_dir)])


KILLED = "os.kill(os.getpid(), 9)"


def on_two_machines(name: str = "mine", **settings):
    engine = {"device": "cpu", "strategy": "ddp", "nodes": 2}
    return make_plan(recipe(frame={**SLURM, "run": {"name": name}, "engine": engine}, **settings))


def test_ranks_of_a_worker_that_was_killed_are_ended_before_the_next_attempt(slurm, job, monkeypatch):
    monkeypatch.setattr(ToyTrain, "parallel", True)
    made = on_two_machines()
    submit(made, Quiet())
    job(made, "source")
    worker(monkeypatch, KILLED)
    slurm.start_steps(*STEPS, "103.0")
    assert job(made, "train") == 1
    assert slurm.steps == ["102.batch", "102.extern", "103.0"]
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert "was killed by signal 9" in failed["message"]


def test_a_worker_that_could_say_how_it_ended_has_no_steps_left(slurm, job, monkeypatch):
    monkeypatch.setattr(ToyTrain, "parallel", True)
    made = on_two_machines()
    submit(made, Quiet())
    job(made, "source")
    outcome = {"status": "failed", "message": "rank 1 of 2 exited 1", "known": True}
    worker(monkeypatch, f"(work / 'outcome.json').write_text({json.dumps(outcome)!r}); sys.exit(1)")
    slurm.start_steps("102.0")
    assert job(made, "train") == 1
    assert slurm.steps == ["102.0"]


def test_steps_of_an_arrays_other_tasks_go_on(slurm, job, monkeypatch):
    monkeypatch.setattr(ToyTrain, "parallel", True)
    plans = [on_two_machines(f"point-{number}", lr=number / 10) for number in (1, 2)]
    submit_sweep(plans, Path("outputs/sweeps/many").absolute(), Quiet())
    job(plans[0], "source")
    worker(monkeypatch, KILLED)
    slurm.start_steps("102_0.0", "102_1.0", "102_1.batch")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "102")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert job(plans[1], "train") == 1
    assert slurm.steps == ["102_0.0", "102_1.batch"]


RANK_ENDED = """
(work / "ready").touch()
while {waits} and not (work / "STOP").exists():
    time.sleep(0.02)
outcome = {{"status": "failed", "known": True, "message": "rank 1 of 4 (process 7 on n2) {how}; the others were ended"}}
(work / "outcome.json").write_text(json.dumps(outcome))
sys.exit(1)
"""


def terminate_when_ready(made):
    """Slurm's SIGTERM to this process, once the worker of stage train is there."""

    def act():
        ready = made.store.work_dir("toy_train", made["train"].key) / "ready"
        while not ready.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    return act


@pytest.mark.parametrize("how", ["exited 143", "was killed by signal 15"])
def test_ranks_that_slurms_sigterm_ended_are_a_stop(job, monkeypatch, how):
    made = submitted()
    job(made, "source")
    worker(monkeypatch, RANK_ENDED.format(waits=True, how=how))
    assert job(made, "train", act=terminate_when_ready(made)) == 75
    (stopped,) = [event for event in made.run_dir.events() if event["event"] == "stage_stopped"]
    assert stopped["message"] == "ended before it could save" and stopped["requeue"] is True


@pytest.mark.parametrize(
    ("how", "stops"), [("exited 143", False), ("exited 1", True), ("was killed by signal 9", True)]
)
def test_other_ends_of_ranks_are_failures(job, monkeypatch, how, stops):
    monkeypatch.setattr(stage_job, "SIGNAL_SECONDS", 0.1)
    made = submitted()
    job(made, "source")
    worker(monkeypatch, RANK_ENDED.format(waits=stops, how=how))
    assert job(made, "train", act=terminate_when_ready(made) if stops else None) == 1
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert f"rank 1 of 4 (process 7 on n2) {how}" in failed["message"]


# ---- others


def test_a_job_that_is_stopped_while_another_run_computes_its_stage_was_waiting(job):
    made = submitted()
    job(made, "source")
    claim = Lock.acquire(made.store.work_dir("toy_train", made["train"].key) / CLAIM)

    def stop():
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        assert job(made, "train", act=stop) == 75
    finally:
        claim.release()
    (stopped,) = [event for event in made.run_dir.events() if event["event"] == "stage_stopped"]
    assert stopped["waiting"] is True and stopped["requeue"] is True and stopped["job"] == "102"
    assert ("stage_started", "train") not in kinds(made.run_dir)
    assert job(made, "train", restarts=1) == 0


def test_a_stop_of_what_the_job_computes_itself_is_no_wait(job):
    made = submitted(steps=12, pause=0.1)
    job(made, "source")
    term = when(made, "metrics", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert job(made, "train", act=term) == 75
    (stopped,) = [event for event in made.run_dir.events() if event["event"] == "stage_stopped"]
    assert not stopped.get("waiting")


@pytest.mark.parametrize("broken", ["tell_sharing", "cancel_descendants", "settle"])
def test_what_follows_a_failure_is_done_in_spite_of_errors(slurm, job, monkeypatch, capsys, broken):
    done: list[str] = []

    def noting(name, act):
        def acted(*arguments, **options):
            done.append(name)
            if name == broken:
                raise OSError("no space left")
            return act(*arguments, **options)

        return acted

    made = submitted(fail="known")
    job(made, "source")
    for name in ("tell_sharing", "cancel_descendants", "settle"):
        monkeypatch.setattr(stage_job, name, noting(name, getattr(stage_job, name)))
    assert job(made, "train") == 1
    assert done == ["tell_sharing", "cancel_descendants", "settle"]
    assert "no space left" in capsys.readouterr().err
    assert (slurm.state("103") == "CANCELLED") == (broken != "cancel_descendants")
    assert (made.run_dir.events()[-1].get("status") == "failed") == (broken == "tell_sharing")


def test_a_job_that_was_done_before_it_was_requeued_is_done_in_spite_of_errors(job, monkeypatch, capsys):
    made = submitted()
    assert job(made, "source") == 0

    def broken(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(stage_job, "settle", broken)
    assert job(made, "source", restarts=1) == 0
    assert "no space left" in capsys.readouterr().err
