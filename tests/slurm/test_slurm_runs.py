"""Submitted runs on a real Slurm, undisturbed and disturbed: every stage once, the same result."""

from __future__ import annotations

import itertools
import time

import pytest
from slurm_world import Site, SubmittedRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

_number = itertools.count(1)
STEPS = 16


class Disturbed:
    """A run that trains for some seconds, long enough to be disturbed; its settings give it keys of its own."""

    def __init__(self, site: Site, name: str, *overrides: str) -> None:
        self.lr = f"0.{next(_number):03d}"
        settings = [f"stages.train.steps={STEPS}", f"stages.train.lr={self.lr}", "stages.train.pause=0.25"]
        self.run = site.submit(name, *settings, "launcher.signal_lead_s=30", *overrides)
        self.run.wait_for_step(3)
        self.job = self.run.job("train")


def restarts(run: SubmittedRun, stage: str = "train") -> list[int]:
    return [event["restarts"] for event in run.events("stage_requeued", stage)]


def ended_once(run: SubmittedRun) -> None:
    """Every stage was done exactly once, and the run ended once, with its report."""
    for stage in ("train", "evaluate"):
        assert len(run.events("stage_finished", stage)) == 1, run.account()
    assert len(run.events("run_finished")) == 1
    assert (run.folder / "reports").read_text() == "built\n"


def test_a_chain_of_three_runs_to_its_end(site: Site, history) -> None:
    run = site.submit("chain", f"stages.train.steps={STEPS}", "stages.train.lr=0.5")
    assert "3 jobs" in run.said
    run.wait_for_end()
    ended_once(run)
    assert run.result() == history(STEPS, "0.5")
    started = run.events("stage_started", "train")[0]
    assert started["job"] == run.job("train") and started["node"] in ("n1", "n2") and started["attempt"] == 1
    assert run.events("stage_submitted", "evaluate")[0]["dependency"].startswith("afterok:")
    again = site.posttrain(
        "submit", "./toy.yaml", f"stages.train.steps={STEPS}", "stages.train.lr=0.5", "--name", "chain"
    )
    assert "nothing to submit" in again.stdout


@pytest.mark.parametrize("grace", [0, 10])
def test_preemption_requeues_once_and_ends_the_same(site: Site, history, grace: int) -> None:
    site.slurm("scontrol", "update", "partition=main", f"GraceTime={grace}")
    disturbed = Disturbed(site, f"preempted-{grace}")
    options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    site.slurm("sbatch", *options, "--wrap=sleep 2")
    disturbed.run.wait_for_end()
    ended_once(disturbed.run)
    assert restarts(disturbed.run) == [1]
    stopped = disturbed.run.events("stage_stopped", "train")
    assert len(stopped) == 1 and stopped[0]["requeue"] and stopped[0]["step"] >= 3
    assert disturbed.run.result() == history(STEPS, disturbed.lr)
    output = (disturbed.run.folder / "slurm" / f"train-{disturbed.job}.out").read_text()
    assert output.count("stage_started") == 2, "the second attempt's output follows the first's"


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_stops_and_requeues(site: Site, history, name: str) -> None:
    disturbed = Disturbed(site, f"signalled-{name}")
    site.slurm("scancel", "--batch", f"--signal={name}", disturbed.job)
    disturbed.run.wait_for_end()
    ended_once(disturbed.run)
    assert restarts(disturbed.run) == [1]
    assert disturbed.run.result() == history(STEPS, disturbed.lr)


def test_the_time_limit_is_told_before_it_comes(site: Site) -> None:
    disturbed = Disturbed(site, "limited", "stages.train.steps=400")
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 45))
    site.slurm("scontrol", "update", f"jobid={disturbed.job}", f"EndTime={end}")
    run = disturbed.run
    run.wait(lambda: restarts(run) == [1], "the requeue", 100)
    assert run.events("stage_stopped", "train")[0]["requeue"]
    site.posttrain("cancel", "limited")


def test_a_node_that_fails_has_its_job_requeued(site: Site, history) -> None:
    disturbed = Disturbed(site, "node-down")
    node = disturbed.run.events("stage_started", "train")[0]["node"]
    site.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    disturbed.run.wait_for_end()
    ended_once(disturbed.run)
    assert restarts(disturbed.run) == [1]
    assert disturbed.run.result() == history(STEPS, disturbed.lr)


def test_scancel_leaves_a_run_that_can_be_resumed(site: Site, history) -> None:
    disturbed = Disturbed(site, "scancelled")
    run = disturbed.run
    site.slurm("scancel", disturbed.job)
    run.wait(lambda: disturbed.job not in site.slurm("squeue", "-h", "-o", "%i").split(), "the job's end")
    site.posttrain("resume", "scancelled")
    run.wait_for_end(times=1)
    assert run.job("train") != disturbed.job and run.result() == history(STEPS, disturbed.lr)
    assert len(run.events("stage_finished", "train")) == 1


def test_cancel_stops_gracefully_and_resume_goes_on(site: Site, history) -> None:
    disturbed = Disturbed(site, "cancelled")
    run = disturbed.run
    said = site.posttrain("cancel", "cancelled").stdout
    assert "posttrain resume cancelled" in said
    assert run.wait_for_end("stopped")["exit"] == 75
    assert run.events("stage_stopped", "train")[0]["requeue"] is False
    assert run.events("stage_stopped", "evaluate")
    assert not restarts(run)
    site.posttrain("resume", "cancelled")
    run.wait_for_end(times=2)
    assert run.result() == history(STEPS, disturbed.lr)


def test_cancel_now_ends_at_once(site: Site) -> None:
    disturbed = Disturbed(site, "killed", "stages.train.steps=400")
    started = time.monotonic()
    site.posttrain("cancel", "killed", "--now")
    assert time.monotonic() - started < 15
    disturbed.run.wait_for_end("stopped")
    assert disturbed.job not in site.slurm("squeue", "-h", "-o", "%i").split()


def test_a_failing_stage_cancels_what_needs_it(site: Site) -> None:
    run = site.submit("failing", "stages.train.lr=0.9", "stages.train.fail=known")
    end = run.wait_for_end("failed")
    assert end["exit"] == 1
    assert "lower lr" in run.events("stage_failed", "train")[0]["message"]
    (cancelled,) = run.events("stage_cancelled")
    assert cancelled["stage"] == "evaluate" and cancelled["message"] == "stage train failed"
    assert not run.events("stage_started", "evaluate")


def test_no_progress_between_requeues_is_a_failure_in_the_end(site: Site) -> None:
    settings = ["stages.train.steps=400", "stages.train.pause=20", "launcher.max_requeues_without_progress=1"]
    run = site.submit("stuck", "stages.train.lr=0.8", "launcher.signal_lead_s=30", *settings)
    for attempt in (1, 2):
        run.wait(lambda n=attempt: len(run.events("stage_started", "train")) == n, f"attempt {attempt}")
        site.slurm("scontrol", "requeue", run.job("train"))
    run.wait_for_end("failed")
    assert "requeued 2 times in a row" in run.events("stage_failed", "train")[-1]["message"]


def test_run_follows_to_the_end_and_ctrl_c_cancels(site: Site) -> None:
    import signal

    settings = ["stages.train.lr=0.7", "launcher.signal_lead_s=30", "stages.train.pause=0.25", "launcher=slurm"]
    command = site.start("run", "./toy.yaml", *settings, "stages.train.steps=40", "--name", "followed")
    run = SubmittedRun(site, "followed")
    run.wait_for_step(3)
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 75, output
    assert "posttrain resume followed" in output and run.wait_for_end("stopped")
    done = site.posttrain("run", "./toy.yaml", *settings, "stages.train.steps=40", "--name", "followed")
    assert "train: started" in done.stdout and "report:" in done.stdout
