"""What runs inside a job: the stage, what signals and failures mean, and the batch script around it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from submitted_runs import SLURM, kinds, plan, recipe, submitted, when
from toy_stages import ToyTrainConfig

from posttrain.launch.signals import Interrupts
from posttrain.launch.slurm import stage_job
from posttrain.launch.slurm.follow import request
from posttrain.launch.slurm.ledger import read_ledger, settle
from posttrain.launch.slurm.stage_job import requeues_without_progress
from posttrain.launch.slurm.submit import submit
from posttrain.pipeline.events import EventLog
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage_runner import Quiet


def test_jobs_of_a_run_end_it_together_and_once(job, slurm, reports):
    made = submitted()
    assert [job(made, stage) for stage in ("source", "train", "evaluate")] == [0, 0, 0]
    assert kinds(made.run_dir)[-1] == ("run_finished", None)
    assert [kind for kind, _ in kinds(made.run_dir)].count("run_finished") == 1 and len(reports) == 1
    started = [event for event in made.run_dir.events() if event["event"] == "stage_started"]
    assert [(event["job"], event["node"]) for event in started] == [("101", "n7"), ("102", "n7"), ("103", "n7")]
    assert (made.run_dir.path / "artifacts" / "evaluate").exists() and made.run_dir.logs("train")


def test_a_signal_stops_the_stage_which_goes_on_in_the_next_attempt(job):
    made = submitted(steps=12, pause=0.1)
    job(made, "source")
    term = when(made, "metrics", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert job(made, "train", act=term) == 75
    (stopped,) = [event for event in made.run_dir.events() if event["event"] == "stage_stopped"]
    assert stopped["requeue"] is True and stopped["job"] == "102" and 0 < stopped["step"] < 12
    assert not any(event["event"] in ("stop_requested", "run_finished") for event in made.run_dir.events())
    assert job(made, "train", restarts=1) == 0
    requeued = [event for event in made.run_dir.events() if event["event"] == "stage_requeued"]
    assert [(event["job"], event["restarts"]) for event in requeued] == [("102", 1)]
    assert kinds(made.run_dir).count(("stage_finished", "train")) == 1


def test_a_cancelled_run_is_not_requeued(job):
    made = submitted(steps=30, pause=0.1)
    job(made, "source")
    assert job(made, "train", act=when(made, "metrics", lambda: request(made.run_dir))) == 130
    (stopped,) = [one for one in made.run_dir.events() if (one["event"], one["stage"]) == ("stage_stopped", "train")]
    assert stopped["requeue"] is False
    settle(made.run_dir, lambda: made)  # as who asks does: this job may have ended before the next one was cancelled
    assert made.run_dir.events()[-1]["status"] == "stopped"
    assert job(made, "train", restarts=1) == 130, "and one that was in the queue meanwhile does not begin"


def test_a_failure_cancels_what_needs_the_stage_and_nothing_else(job, slurm):
    made = submitted(fail="known", extra={"second": ToyTrainConfig(inputs={"data": "source.train"}, lr=0.3)})
    job(made, "source")
    assert job(made, "train") == 1
    assert slurm.state("103" if _job(made, "evaluate") == "103" else "104") == "CANCELLED"
    assert slurm.state(_job(made, "second")) == "PENDING"
    (cancelled,) = [event for event in made.run_dir.events() if event["event"] == "stage_cancelled"]
    assert cancelled["stage"] == "evaluate" and cancelled["message"] == "stage train failed"
    assert not any(event["event"] == "run_finished" for event in made.run_dir.events()), "the other branch goes on"
    assert job(made, "second") == 0
    assert made.run_dir.events()[-1]["status"] == "failed"


def _job(made, stage):
    return [e["job"] for e in made.run_dir.events() if e["event"] == "stage_submitted" and e["stage"] == stage][0]


def test_an_input_that_changed_since_the_submission(job):
    made = submitted()
    Path("outside.txt").write_text("changed")
    assert job(made, "source") == 1
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert "changed since the run was submitted" in failed["message"] and "posttrain resume mine" in failed["message"]
    assert made.run_dir.events()[-1]["status"] == "failed"


def test_a_parent_that_is_not_in_the_store(job):
    made = submitted()
    assert job(made, "train") == 1
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert "artifact of stage source, which is not in the store" in failed["message"]


def test_a_damaged_input_is_set_aside_so_that_resume_makes_it_again(job):
    made = submitted()
    job(made, "source")
    store, data = made.store, made["source"]
    rows = store.folder("toy_source", data.key) / "train" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("row 0", "row X"))
    assert job(made, "train") == 1
    events = made.run_dir.events()
    assert [event["stage"] for event in events if event["event"] == "artifact_damaged"] == ["source"]
    assert not store.folder("toy_source", data.key).exists()
    again = submit(plan(), Quiet())
    assert set(again.jobs) == {"source", "train", "evaluate"}


def test_what_a_process_that_was_killed_could_not_say(job):
    made = submitted()
    assert job(made, "source", died=137) == 1
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert "code 137" in failed["message"] and "memory" in failed["message"]
    assert made.run_dir.events()[-1]["status"] == "failed"


def test_a_job_that_nobody_waits_for_does_nothing(job, slurm, capsys):
    made = submitted(fail="known")
    job(made, "source")
    assert job(made, "train") == 1
    before = len(made.run_dir.events())
    assert job(made, "train", restarts=1) == 130, "its stage has failed, and somebody has requeued it"
    submit(plan(fail="known"), Quiet())
    slurm.set("102", "RUNNING")
    monkey = {"SLURM_JOB_ID": "102", "SLURM_RESTART_COUNT": "1"}
    with pytest.MonkeyPatch.context() as patch, Interrupts() as interrupts:
        for name, value in monkey.items():
            patch.setenv(name, value)
        assert stage_job.main(made.run_dir.path, "train", interrupts) == 130
    assert "waits for nothing from job 102 (train)" in capsys.readouterr().out
    assert not any(event.get("restarts") for event in made.run_dir.events()[before:])


def test_force_is_for_the_first_attempt_alone(job):
    made = submitted()
    for stage in ("source", "train", "evaluate"):
        job(made, stage)

    forced = make_plan(recipe(frame=SLURM), force=["train"])
    assert list(submit(forced, Quiet()).jobs) == ["train", "evaluate"], "its result may differ"
    assert 'stage-job "$run" train)' in (made.run_dir.path / "slurm/train.sh").read_text()
    assert '"${command[@]}" --force &' in (made.run_dir.path / "slurm/train.sh").read_text()
    assert job(made, "train", force=True) == 0
    assert kinds(made.run_dir).count(("stage_finished", "train")) == 2
    assert job(made, "train", force=True, restarts=1) == 0
    assert kinds(made.run_dir).count(("stage_finished", "train")) == 2


def test_force_is_not_lost_when_the_first_attempt_was_stopped_before_it_began(job):
    made = submitted()
    assert job(made, "source") == 0 and job(made, "train") == 0
    made = make_plan(recipe(frame=SLURM), force=["train"])
    submit(made, Quiet())
    assert job(made, "train", force=True, restarts=1) == 0
    assert kinds(made.run_dir).count(("stage_finished", "train")) == 2


def test_an_attempt_that_goes_on_is_not_forced_to_begin_again(job):
    made = submitted()
    assert job(made, "source") == 0 and job(made, "train") == 0
    made = make_plan(recipe(frame=SLURM), force=["train"])
    submit(made, Quiet())
    begun = read_ledger(made.run_dir).jobs["train"]
    EventLog(made.run_dir.events_path).append("stage_started", "train", job=begun, attempt=2)
    assert job(made, "train", force=True, restarts=1) == 0
    assert kinds(made.run_dir).count(("stage_finished", "train")) == 1


def _attempts(*attempts, first=0):
    """Events of attempts, each given as the steps it reported; None: it did not even start."""
    events, restarts = [{"event": "run_started", "stage": None}, {"event": "stage_submitted", "stage": "train"}], first
    for number, steps in enumerate(attempts):
        if number:
            restarts += 1
            if steps is None:
                continue
            events.append({"event": "stage_requeued", "stage": "train", "restarts": restarts})
        events += [{"event": "metrics", "stage": "train", "step": step} for step in steps or ()]
    return events


@pytest.mark.parametrize(
    ("attempts", "count"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2], [3, 4], []], 0),
        ([[1, 2], [3], [3], []], 1),
        ([[1, 2], [2], [2], []], 2),
        ([[], [], [], []], 3),
        ([[], [], [1], []], 0),
        ([[1], None, None, []], 2),
    ],
)
def test_requeues_without_progress(attempts, count):
    assert requeues_without_progress(_attempts(*attempts), "train") == count


def test_another_submission_counts_anew_and_a_kept_job_goes_on_counting():
    """A job that is kept was requeued five times before, and comes further every time; the run before came to 5000."""
    again = [{"event": "run_started", "stage": None}, {"event": "stage_submitted", "stage": "train", "kept": True}]
    started = _attempts([5000]) + again
    for number, step in enumerate([1000, 2000, 3000, 4000], 6):
        started += [{"event": "stage_requeued", "stage": "train", "restarts": number}]
        started += [{"event": "metrics", "stage": "train", "step": step}]
    assert requeues_without_progress(started, "train") <= 1


def test_waiting_for_another_run_is_no_lack_of_progress():
    events = _attempts([1])
    for number in range(1, 6):
        events.append({"event": "stage_stopped", "stage": "train", "waiting": True, "requeue": True})
        events.append({"event": "stage_requeued", "stage": "train", "restarts": number})
    assert requeues_without_progress(events, "train") == 0


def test_an_error_in_what_comes_after_does_not_undo_a_stage(job, monkeypatch, capsys):
    def broken(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(stage_job, "settle", broken)
    made = submitted()
    assert job(made, "source") == 0
    assert "no space left" in capsys.readouterr().err
    assert kinds(made.run_dir)[-1] == ("stage_finished", "source")


def test_the_store_has_the_last_word_on_a_stage_whose_end_was_lost(job, slurm):
    made = submitted()
    assert job(made, "source") == 0
    lines = [line for line in made.run_dir.events_path.read_text().splitlines() if "stage_finished" not in line]
    made.run_dir.events_path.write_text("\n".join(lines) + "\n")
    slurm.set(_job(made, "source"), "COMPLETED")
    settle(made.run_dir, lambda: made)
    assert read_ledger(made.run_dir).entries["source"].status == "done"


def test_too_many_requeues_without_progress_fail(job):
    made = submitted(launcher={"max_requeues_without_progress": 2})
    job(made, "source")
    assert job(made, "train", restarts=3) == 1
    (failed,) = [event for event in made.run_dir.events() if event["event"] == "stage_failed"]
    assert "requeued 3 times in a row" in failed["message"]


# ---- the batch script, with a program in posttrain's place

PROGRAM = """#!{python}
import signal, sys, time
from pathlib import Path
log = Path({log!r})
def write(text): log.open("a").write(text + "\\n")
write(" ".join(sys.argv[3:]))
if "--died" in sys.argv: sys.exit(1)
def term(*_):
    write("term")
    time.sleep(0.3)
    sys.exit({code})
if {listens}: signal.signal(signal.SIGTERM, term)
Path({ready!r}).touch()
if {waits}: time.sleep(20)
sys.exit({code})
"""


def run_script(slurm: FakeSlurm, tmp_path, code=0, *, waits=False, listens=True, send=None, state="RUNNING", setup=()):
    log, ready = tmp_path / "log", tmp_path / "ready"
    program = tmp_path / "python"
    facts = {"log": str(log), "ready": str(ready), "code": code, "waits": waits, "listens": listens}
    program.write_text(PROGRAM.format(python=sys.executable, **facts))
    program.chmod(0o755)
    log.touch()
    made = submitted(launcher={"python": str(program), "setup": list(setup)})
    job = _job(made, "train")
    slurm.set(job, state)
    path = made.run_dir.path / "slurm" / "train.sh"
    process = subprocess.Popen(["bash", path], env={**os.environ, "SLURM_JOB_ID": job})
    for one in send or ():
        while not ready.exists():
            time.sleep(0.02)
        process.send_signal(one)
        time.sleep(0.1)
    return process.wait(20), log.read_text().splitlines(), slurm.named("scontrol")


@pytest.mark.parametrize("code", [0, 1, 130])
def test_the_scripts_code_is_the_stages(slurm, tmp_path, code):
    assert run_script(slurm, tmp_path, code) == (code, [f"stage-job {tmp_path}/outputs/runs/mine train"], [])


@pytest.mark.parametrize("send", [[signal.SIGUSR1], [signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM]])
def test_signals_are_passed_on_and_a_stop_is_requeued(slurm, tmp_path, send):
    code, log, requeued = run_script(slurm, tmp_path, 75, waits=True, send=send)
    assert code == 75 and log[1:2] == ["term"] and requeued == [["requeue", "102"]]


def test_a_stage_that_is_done_in_spite_of_the_signal_is_done(slurm, tmp_path):
    code, log, requeued = run_script(slurm, tmp_path, 0, waits=True, send=[signal.SIGUSR1])
    assert code == 0 and log[1:] == ["term"] and requeued == []


def test_a_job_that_slurm_ends_is_not_requeued(slurm, tmp_path):
    code, _, requeued = run_script(slurm, tmp_path, 75, waits=True, send=[signal.SIGTERM], state="COMPLETING")
    assert code == 75 and requeued == []


def test_a_signal_before_anybody_listens_is_not_lost(slurm, tmp_path):
    code, _, requeued = run_script(slurm, tmp_path, 0, waits=True, listens=False, send=[signal.SIGUSR1])
    assert code == 75 and requeued == [["requeue", "102"]]


def test_a_program_that_dies_is_told_of(slurm, tmp_path):
    code, log, requeued = run_script(slurm, tmp_path, 9)
    assert code == 9 and log[1].endswith("train --died 9") and requeued == []


@pytest.mark.parametrize("code", [126, 127])
def test_a_program_that_cannot_be_started_is_not_started_again(slurm, tmp_path, capfd, code):
    ended, log, requeued = run_script(slurm, tmp_path, code)
    assert ended == code and len(log) == 1 and requeued == []
    assert "train cannot be started here: look at launcher.python" in capfd.readouterr().out


def test_a_signal_while_the_job_is_set_up_requeues_it(slurm, tmp_path):
    setup = [f"touch {tmp_path}/ready", "sleep 2"]
    code, log, requeued = run_script(slurm, tmp_path, 0, send=[signal.SIGUSR1], setup=setup)
    assert code == 75 and log == [] and requeued == [["requeue", "102"]]


def test_a_setup_that_sets_e_does_not_keep_a_stop_from_being_requeued(slurm, tmp_path):
    code, log, requeued = run_script(slurm, tmp_path, 75, waits=True, send=[signal.SIGUSR1], setup=["set -eu"])
    assert code == 75 and log[1:2] == ["term"] and requeued == [["requeue", "102"]]


def test_a_requeue_that_slurm_refuses_is_given_up(slurm, tmp_path, monkeypatch):
    slurm.refuse("scontrol")
    (slurm.bin / "sleep").write_text("#!/bin/sh\n")
    (slurm.bin / "sleep").chmod(0o755)
    code, _, requeued = run_script(slurm, tmp_path, 75, waits=True, send=[signal.SIGUSR1])
    assert code == 75 and len(requeued) == 10
