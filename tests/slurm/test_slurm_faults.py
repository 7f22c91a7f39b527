"""A real Slurm whose parts fail, many disturbances in one pipeline, a sweep, and a real recipe."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_world import CLUSTER, Site, SubmittedRun
from test_slurm_runs import STEPS, Disturbed, ended_once, restarts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]


class Daemons:
    """The cluster's own processes."""

    def __init__(self, site: Site) -> None:
        self.site, self.folder = site, Path(site.environment["SLURM_CONF"]).parent
        self.pids = Path((self.folder / "rundir").read_text().strip())

    def end(self, name: str, number: int) -> None:
        os.kill(int((self.pids / f"{name}.pid").read_text()), number)

    def start(self) -> None:
        """Start what does not run, and wait for every node."""
        settings = {name: value for name, value in self.site.environment.items() if name != "SLURM_CONF"}
        settings["TINYSLURM_CPUS"] = "8"
        subprocess.run([CLUSTER / "up.sh", self.folder], env=settings, check=True, timeout=120, capture_output=True)


@pytest.fixture
def daemons(site: Site) -> Daemons:
    return Daemons(site)


def test_a_controller_that_is_away_for_a_while(site: Site, history, daemons: Daemons) -> None:
    disturbed = Disturbed(site, "controller")
    daemons.end("slurmctld", signal.SIGTERM)
    time.sleep(6)
    daemons.start()
    disturbed.run.wait_for_end()
    ended_once(disturbed.run)
    assert restarts(disturbed.run) == [] and disturbed.run.result() == history(STEPS, disturbed.lr)


def test_a_node_daemon_that_is_killed(site: Site, history, daemons: Daemons) -> None:
    disturbed = Disturbed(site, "slurmd")
    node = disturbed.run.events("stage_started", "train")[0]["node"]
    daemons.end(f"slurmd.{node}", signal.SIGKILL)
    time.sleep(2)
    daemons.start()
    disturbed.run.wait_for_end()
    ended_once(disturbed.run)
    assert disturbed.run.result() == history(STEPS, disturbed.lr)


def test_a_worker_that_is_killed_is_a_failure_and_resume_goes_on(site: Site, history) -> None:
    disturbed = Disturbed(site, "worker")
    run = disturbed.run
    os.kill(run.events("stage_started", "train")[0]["pid"], signal.SIGKILL)
    run.wait_for_end("failed", seconds=20)
    assert "killed by signal 9" in run.events("stage_failed", "train")[0]["message"]
    assert run.events("stage_cancelled", "evaluate")
    site.posttrain("resume", "worker")
    run.wait_for_end(times=2)
    assert run.result() == history(STEPS, disturbed.lr)


def test_everything_of_a_job_killed_by_memory_or_hand(site: Site, history) -> None:
    disturbed = Disturbed(site, "whole-job")
    run = disturbed.run
    worker = run.events("stage_started", "train")[0]["pid"]
    parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    run.wait_for_end("failed", seconds=40)
    assert "code 137" in run.events("stage_failed", "train")[0]["message"]
    site.posttrain("resume", "whole-job")
    run.wait_for_end(times=2)
    assert run.result() == history(STEPS, disturbed.lr)


def test_a_sweep_is_an_array(site: Site, history) -> None:
    settings = [f"stages.train.steps={STEPS}", "stages.train.pause=0.2", "launcher.signal_lead_s=30"]
    settings.append("stages.source.rows=5")  # a source of its own, for all points to share
    rates = ["0.91", "0.92", "0.93"]
    swept = f"stages.train.lr={','.join(rates)}"
    said = site.posttrain("submit", "./toy.yaml", "-m", swept, *settings, "--name", "rates", "--yes").stdout
    assert "3 runs, 7 jobs" in said
    runs = [SubmittedRun(site, f"rates-{number}") for number in (1, 2, 3)]
    runs[1].wait_for_step(3)
    job = runs[1].job("train")
    assert job.endswith("_1")
    site.slurm("scancel", "--batch", "--signal=USR1", job)
    for run, rate in zip(runs, rates, strict=True):
        run.wait_for_end()
        assert run.result() == history(STEPS, rate)
        assert len(run.events("stage_finished", "train")) == 1
    assert [restarts(run) for run in runs] == [[], [1], []], "of the array one task alone"
    assert sum(len(run.events("stage_finished", "source")) for run in runs) == 1
    assert runs[0].job("evaluate").partition("_")[0] == runs[2].job("evaluate").partition("_")[0]
    record = json.loads((site.folder / "outputs/sweeps/rates/sweep.json").read_text())
    assert [point["run"] for point in record["points"]] == [run.name for run in runs]


CHAIN = """
defaults: [base, _self_]
stages:
  source: {type: toy_source, rows: 7}
  train: {type: toy_train, inputs: {data: source.train}}
  more: {type: toy_train, inputs: {data: source.train, before: train.history}}
  evaluate: {type: toy_evaluate, inputs: {history: more.history, data: source.heldout}}
"""


@pytest.mark.timeout(560)
def test_twenty_disturbances_in_one_pipeline(site: Site, daemons: Daemons) -> None:
    """Whatever comes, in whatever order: the undisturbed result, every stage done once."""
    dice = random.Random(7)
    site.recipe("chain", CHAIN)
    values = ("steps=110", "lr=0.01", "pause=0.25")
    settings = [f"stages.{stage}.{value}" for stage in ("train", "more") for value in values]
    launcher = ["launcher.signal_lead_s=30", "launcher.max_requeues_without_progress=30"]
    run = site.submit("shaken", *settings, *launcher, recipe="chain")
    quick = [text.replace("pause=0.25", "pause=0") for text in settings]
    site.posttrain("run", "./chain.yaml", *quick, "--yes", "--name", "calm", "paths.outputs=calm")
    done: list[str] = []
    while len(done) < 20:
        kind = dice.choice(["USR1", "TERM", "requeue", "preempt", "node", "worker", "controller", "slurmd", "cancel"])
        # What is running now, and has come somewhere; between two stages there is nothing to disturb.
        starts = [event for event in run.events("stage_started") if event["stage"] in ("train", "more")]
        ends = {event["stage"] for event in run.events("stage_finished")}
        states = dict(line.split() for line in site.slurm("squeue", "-h", "-o", "%i %T").splitlines())
        live = [event for event in starts if states.get(event["job"]) == "RUNNING" and event["stage"] not in ends]
        if ends >= {"train", "more"}:
            break
        if not live:
            if run.events()[-1]["event"] == "run_finished":
                site.posttrain("resume", "shaken")
            time.sleep(0.2)
            continue
        time.sleep(dice.uniform(0, 1.5))
        disturb(kind, live[-1], site, daemons)
        done.append(kind)
        time.sleep(dice.uniform(0, 1.0))
    assert len(done) == 20, f"the pipeline was too quick: {done}"
    end = time.monotonic() + 200
    while run.events()[-1].get("status") != "done":
        assert time.monotonic() < end, run.account()
        if run.events()[-1]["event"] == "run_finished":
            site.posttrain("resume", "shaken")
        time.sleep(0.5)
    for stage in ("source", "train", "more", "evaluate"):
        assert len(run.events("stage_finished", stage)) == 1, (done, run.account())
    for stage in ("train", "more"):
        calm = site.folder / "calm/runs/calm/artifacts" / stage / "history/history.jsonl"
        assert run.result(stage) == calm.read_bytes(), done


def disturb(kind: str, started: dict, site: Site, daemons: Daemons) -> None:
    job = started["job"]
    if kind in ("USR1", "TERM"):
        site.slurm("scancel", "--batch", f"--signal={kind}", job, check=False)
    elif kind == "requeue":
        site.slurm("scontrol", "requeue", job, check=False)
    elif kind == "preempt":
        options = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
        site.slurm("sbatch", *options, "--wrap=sleep 1")
    elif kind == "node":
        site.slurm("scontrol", "update", f"nodename={started['node']}", "state=down", "reason=test", check=False)
    elif kind == "worker":
        try:
            os.kill(started["pid"], signal.SIGKILL)
        except ProcessLookupError:
            pass
    elif kind == "cancel":
        site.posttrain("cancel", "shaken")
    else:
        daemon = "slurmctld" if kind == "controller" else f"slurmd.{started['node']}"
        daemons.end(daemon, signal.SIGTERM if kind == "controller" else signal.SIGKILL)
        time.sleep(1.0)
        daemons.start()


@pytest.mark.timeout(500)
def test_a_real_recipe(slurm: dict[str, str], site: Site) -> None:
    """`x_ecomla scale=smoke`: eight stages with torch, distillation told to stop in the middle."""
    said = site.posttrain("submit", "x_ecomla", "scale=smoke", "launcher.signal_lead_s=30", "--name", "real").stdout
    assert "8 jobs" in said
    run = SubmittedRun(site, "real")
    run.wait(lambda: run.step("distill") >= 2, "distillation", 300)
    site.slurm("scancel", "--batch", "--signal=USR1", run.job("distill"), check=False)
    run.wait_for_end(seconds=400)
    stages = ["model", "data", "upcycle", "evaluate_converted", "distill", "datasets.pairs", "prefer", "evaluate"]
    assert sorted(event["stage"] for event in run.events("stage_finished")) == sorted(stages)
    assert (run.folder / "report.html").exists()
