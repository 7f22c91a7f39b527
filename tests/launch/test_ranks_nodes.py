"""A stage on several machines of a Slurm job, whose commands are pretended: where it meets, and whom it blames."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm

from posttrain.errors import EXIT_FAILED, StageError, StopRequested
from posttrain.launch import agent, node
from posttrain.launch.job import Job
from posttrain.launch.rank import COMPUTED, RANKS
from posttrain.launch.ranks import PORTS, port_of_job, run_ranks, srun_command

JOB = Job("train", "toy_train", "0123456789abcdef", {}, {}, 0, {}, {}, {}, "target", "events", ranks=2, nodes=2)
DONE = {"status": "done", "metrics": {"loss": 1.0}}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    (folder / RANKS).mkdir(parents=True)
    return folder


@pytest.fixture
def inside(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm's commands, within a job of two machines."""
    monkeypatch.setenv("SLURM_JOB_ID", "102")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return slurm


def ended(what: str, code: int, moment: float) -> dict[str, object]:
    return {"ended": what, "code": code, "time": moment}


def failure_of(work: Path) -> str:
    with pytest.raises(StageError) as caught:
        run_ranks(JOB, work)
    return str(caught.value)


# ---- the job and its machines


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_of_a_job_it_is_refused_with_what_to_do(
    inside: FakeSlurm, work: Path, monkeypatch, missing: str
) -> None:
    monkeypatch.delenv(missing)
    said = failure_of(work)
    assert "engine.nodes=2, but this process is in no Slurm job" in said
    assert "submit it with launcher=slurm, or engine.nodes=1" in said and not inside.calls


def test_a_job_of_another_number_of_machines(inside: FakeSlurm, work: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2,n3")
    assert "the Slurm job has 3 machines (n1,n2,n3), the stage wants 2" in failure_of(work)
    assert not inside.named("srun")


def test_what_scontrol_says_is_passed_on(inside: FakeSlurm, work: Path) -> None:
    inside.refuse("scontrol")
    assert "has 0 machines (n1,n2), the stage wants 2: scontrol: error: Invalid account" in failure_of(work)


@pytest.mark.parametrize(("there", "missing"), [("scontrol", "srun"), ("srun", "scontrol")])
def test_a_program_that_is_missing(inside: FakeSlurm, work: Path, tmp_path: Path, monkeypatch, there, missing) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / there).symlink_to(inside.bin / there)
    monkeypatch.setenv("PATH", str(tmp_path / "few"))
    said = failure_of(work)
    assert f"{missing} is not on the PATH of the job's first machine" in said and "launcher.setup" in said


# ---- one process a machine


def test_srun_starts_a_process_on_every_machine(inside: FakeSlurm, work: Path, capfd) -> None:
    inside.answer_srun(0, {COMPUTED: DONE})
    assert run_ranks(JOB, work) == {"metrics": {"loss": 1.0}}
    (call,) = inside.named("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--export=ALL"} <= set(call)
    endpoint = f"n1:{port_of_job({'SLURM_JOB_ID': '102'})}"
    assert call[-4:] == ["-m", "posttrain.launch.node", str(work), endpoint]
    assert f"2 machines (n1, n2), meeting at {endpoint}" in capfd.readouterr().out


def test_a_step_has_the_cores_of_the_job(monkeypatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert not any("cpus" in word for word in srun_command(2, ["program", "word"]))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
    command = srun_command(2, ["program", "word"])
    assert "--cpus-per-task=16" in command and command[-2:] == ["program", "word"]


def test_ports_are_the_jobs_own_and_change_with_a_requeue() -> None:
    def port(job: int, restarts: int | None = None) -> int:
        count = {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
        return port_of_job({"SLURM_JOB_ID": str(job), **count})

    found = [port(job, restarts) for job in (1, 2, 3, 99_999_999) for restarts in range(20)]
    assert len(set(found)) == len(found) and all(number in PORTS for number in found)
    assert port(7) == port(7, 0)


# ---- how it ends


def test_what_an_earlier_attempt_left_is_no_result(inside: FakeSlurm, work: Path) -> None:
    (work / COMPUTED).write_text(json.dumps(DONE))
    (work / RANKS / "node_1.json").write_text(json.dumps(ended("rank 2 of 4 was killed by signal 9", -9, 1.0)))
    inside.answer_srun(7, {})
    assert "srun ended with code 7 and no machine said why" in failure_of(work)


def test_an_srun_that_fails_after_rank_0_has_left_its_result_is_no_failure(inside: FakeSlurm, work: Path) -> None:
    inside.answer_srun(143, {COMPUTED: DONE})
    assert run_ranks(JOB, work) == {"metrics": {"loss": 1.0}}


def test_a_stop_that_was_saved_is_a_stop_though_srun_fails(inside: FakeSlurm, work: Path) -> None:
    inside.answer_srun(143, {COMPUTED: {"status": "stopped", "step": 6}})
    with pytest.raises(StopRequested) as caught:
        run_ranks(JOB, work)
    assert caught.value.step == 6


KILLED = ended("rank 3 of 4 (process 9 on n2) was killed by signal 9", -9, 30.0)
TERMED = ended("rank 0 of 4 (process 7 on n1) was killed by signal 15", -15, 10.0)
ENDED = ended("rank 0 of 4 (process 7 on n1) exited 143", 143, 10.0)
LEFT = ended("rank 1 of 4 (process 8 on n1) exited 1", 1, 20.0)
LOST = ended("n1 could not start its ranks or lost the others: DistStoreError: timed out", EXIT_FAILED, 25.0)


@pytest.mark.parametrize(
    ("machines", "blamed"),
    [
        ([TERMED, KILLED], "rank 3 of 4"),
        ([ENDED, KILLED], "rank 3 of 4"),
        ([LEFT, KILLED], "rank 3 of 4"),
        ([LOST, KILLED], "rank 3 of 4"),
        ([ENDED, LEFT], "rank 1 of 4"),
        ([TERMED, LOST], "n1 could not start its ranks"),
        ([LOST, LEFT], "rank 1 of 4"),  # the first of those that ended by themselves
    ],
)
def test_of_several_machines_the_one_whose_rank_was_killed_is_blamed(
    inside: FakeSlurm, work: Path, machines: list[dict[str, object]], blamed: str
) -> None:
    for first in (0, 1):
        files = {f"{RANKS}/node_{(first + index) % 2}.json": one for index, one in enumerate(machines)}
        inside.answer_srun(1, files)
        said = failure_of(work)
        assert said.startswith(blamed) and "the other ranks were ended" in said
        assert ("too much memory" in said) == (KILLED in machines)


# ---- a machine's own process


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """This process as that of the second machine."""
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_machine_that_does_not_see_the_job_says_so(inside: FakeSlurm, work: Path) -> None:
    said = failure_of(work)
    assert said.startswith("n1 could not start its ranks") and "StageError" in said and "holds no job" in said
    for index, name in enumerate(("n1", "n2")):
        noted = json.loads((work / RANKS / f"node_{index}.json").read_text())
        assert noted["ended"].startswith(f"{name} could not start") and noted["code"] == EXIT_FAILED


def test_a_machine_that_does_not_reach_the_first_says_so(machine, work: Path, monkeypatch, capfd) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    monkeypatch.setattr(agent, "JOIN_SECONDS", 1)
    JOB.write(work)
    assert node.main(work, f"localhost:{port}") == EXIT_FAILED
    noted = json.loads((work / RANKS / "node_1.json").read_text())
    assert noted["ended"].startswith("n2 could not start its ranks or lost the others: Dist") and noted["code"] == 1
    assert "Traceback" in capfd.readouterr().err


def test_slurms_sigterm_to_a_machine_is_a_wish_to_stop(machine, work: Path, monkeypatch) -> None:
    def start(job: Job, folder: Path, place: agent.Node) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (folder / "STOP").exists() and (place.index, place.name) == (1, "n2")
        return ""

    monkeypatch.setattr(node, "start_ranks", start)
    JOB.write(work)
    assert node.main(work, "n1:10000") == 0
