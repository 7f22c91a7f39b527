"""A training stage on two machines of a real Slurm, two ranks each: the same numbers as four ranks of one machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from slurm_world import ROOT, Site, SubmittedRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

RECIPE = ["x_ecomla", "scale=smoke", "engine=ddp", "engine.device=cpu", "stages.distill.save_every=2"]
FOUR = ["engine.ranks=4"]
TWO_BY_TWO = ["engine.ranks=2", "engine.nodes=2", "launcher.signal_lead_s=30"]
LONGER = ["stages.distill.max_steps=40"]
SECONDS = 200.0


class RealSite(Site):
    """A site whose recipe is a shipped one: no toys, and reports as they are."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        super().__init__(folder, environment)
        self.environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))


@pytest.fixture(scope="module")
def real(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> RealSite:
    """A site in whose store all that distill needs is there."""
    site = RealSite(tmp_path_factory.mktemp("real"), slurm)
    site.posttrain("run", *RECIPE, "--until", "upcycle", "--name", "before")
    return site


@pytest.fixture(scope="module")
def four_ranks(real: RealSite):
    """What four ranks of one machine give; the artifact is taken away, so that a job has to make its own."""
    found: dict[tuple[str, ...], bytes] = {}

    def history(*overrides: str) -> bytes:
        if overrides not in found:
            name = f"local{len(found)}"
            real.posttrain("run", *RECIPE, *FOUR, *overrides, "--until", "distill", "--name", name)
            run = SubmittedRun(real, name)
            found[overrides] = run.result("distill")
            take_away(run)
        return found[overrides]

    return history


def take_away(run: SubmittedRun) -> None:
    run.site.slurm("rm", "-r", str((run.folder / "artifacts" / "distill").resolve()))


def submit(site: RealSite, name: str, *overrides: str) -> SubmittedRun:
    site.posttrain("submit", *RECIPE, *TWO_BY_TWO, *overrides, "--until", "distill", "--name", name)
    return SubmittedRun(site, name)


def rank_process(rank: int) -> int:
    """Process id of a rank of the only stage that runs on several."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"posttrain.launch.rank" in (folder / "cmdline").read_bytes():
                variables = (folder / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"there is no rank {rank}")


def test_two_machines_of_two_ranks_are_four_ranks(real: RealSite, four_ranks) -> None:
    expected = four_ranks()
    run = submit(real, "nodes")
    run.wait_for_end(seconds=SECONDS)
    assert run.result("distill") == expected
    log = (run.folder / "logs" / "distill" / "attempt_1.log").read_text()
    assert "2 machines (n1, n2), meeting at n1:" in log
    take_away(run)


def test_a_rank_killed_on_the_second_machine_fails_the_stage_and_resumes(real: RealSite, four_ranks) -> None:
    expected = four_ranks(*LONGER)
    run = submit(real, "rank-killed", *LONGER)
    run.wait_for_step(3, "distill")
    os.kill(rank_process(3), signal.SIGKILL)
    run.wait_for_end("failed", seconds=30)
    (failed,) = run.events("stage_failed", "distill")
    assert "rank 3 of 4" in failed["message"] and "on n2) was killed by signal 9" in failed["message"]
    real.posttrain("resume", "rank-killed")
    run.wait_for_end(seconds=SECONDS, times=2)
    assert run.result("distill") == expected
    assert "going on from step" in (run.folder / "logs" / "distill" / "attempt_2.log").read_text()
    take_away(run)


def test_preemption_of_two_machines_requeues_and_ends_the_same(real: RealSite, four_ranks) -> None:
    expected = four_ranks(*LONGER)
    real.slurm("scontrol", "update", "partition=main", "GraceTime=20")
    run = submit(real, "nodes-preempted", *LONGER)
    run.wait_for_step(3, "distill")
    real.slurm("sbatch", "--partition=high", "--nodes=1", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    run.wait_for_end(seconds=SECONDS)
    assert [event["restarts"] for event in run.events("stage_requeued", "distill")] == [1]
    assert run.events("stage_stopped", "distill")[0]["step"] >= 3
    assert run.result("distill") == expected
    take_away(run)


def test_ranks_save_when_slurm_ends_the_job_without_a_warning(real: RealSite, four_ranks) -> None:
    """A requeue sends SIGTERM to every process at once: to ranks, to the processes that started them, to the worker."""
    expected = four_ranks(*LONGER)
    run = submit(real, "requeued", *LONGER, "stages.distill.save_every=0")
    run.wait_for_step(3, "distill")
    real.slurm("scontrol", "requeue", run.job("distill"))
    run.wait_for_end(seconds=SECONDS)
    (stopped,) = run.events("stage_stopped", "distill")
    log = (run.folder / "logs" / "distill" / "attempt_2.log").read_text()
    assert f"going on from step {stopped['step']}" in log
    assert run.result("distill") == expected
