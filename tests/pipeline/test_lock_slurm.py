"""A lock whose holder's Slurm job is over is taken over without waiting for the whole silence."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from posttrain.pipeline import lock as locks
from posttrain.pipeline import slurm_job
from posttrain.pipeline.lock import Owner, held, this_process

ELSEWHERE = Owner(4711, "12345", "node-7", "another boot pid:[4026531836]", "theirs", job="812", restarts=1)


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(slurm_job, "_answers", {})


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A squeue that says what it is told, and how often it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def says(text: str, code: int = 0, error: str = "") -> Path:
        script = folder / "squeue"
        script.write_text(f"#!/bin/sh\necho x >> {tmp_path}/asked\necho '{error}' >&2\necho \"{text}\"\nexit {code}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "asked"

    return says


def silent(path: Path, owner: Owner, seconds: float) -> Path:
    path.mkdir(exist_ok=True)
    file = path / "1"
    file.write_text(json.dumps(asdict(owner)))
    then = time.time() - seconds
    os.utime(file, (then, then))
    return path


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "PENDING"])
def test_a_holder_whose_job_is_over_counts_as_dead_after_a_short_silence(tmp_path, squeue, state):
    squeue(state)
    assert held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS - 5)), "it has just beaten"
    assert not held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED"])
def test_a_holder_whose_job_runs_is_given_the_whole_silence(tmp_path, squeue, state):
    squeue(state)
    assert held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))
    assert not held(silent(tmp_path / "lock", ELSEWHERE, locks.STALE_SECONDS + 1))


def test_a_job_that_slurm_has_forgotten_is_over(tmp_path, squeue):
    squeue("", 1, "slurm_load_jobs error: Invalid job id specified")
    assert not held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))


def test_a_controller_that_does_not_answer_says_nothing(tmp_path, squeue):
    squeue("", 1, "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))


def test_without_slurm_only_silence_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))
    assert held(silent(tmp_path / "lock", replace(ELSEWHERE, job=""), locks.SILENT_SECONDS + 1))


def test_an_earlier_attempt_of_our_own_job_is_over_and_nobody_is_asked(tmp_path, squeue, monkeypatch):
    asked = squeue("RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert not held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))
    assert held(silent(tmp_path / "lock", replace(ELSEWHERE, restarts=3), locks.SILENT_SECONDS + 1)), "a later one"
    assert not asked.exists()


def test_slurm_is_asked_once_in_a_while(tmp_path, squeue):
    asked = squeue("RUNNING")
    path = silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1)
    assert all(held(path) for _ in range(5))
    assert asked.read_text().count("x") == 1


def test_a_process_says_in_which_job_and_on_which_machine_it_is(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    owner = this_process()
    assert (owner.job, owner.restarts, owner.host) == ("815", 4, "n17")
    assert "Slurm job 815" in str(owner)
    assert str(replace(owner, space="elsewhere")).endswith("on n17 (Slurm job 815)")


def test_a_task_of_an_array_is_told_apart_from_the_array(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "24", "SLURM_ARRAY_JOB_ID": "24", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert slurm_job.this_job() == ("24_2", 0)


def test_jobs_that_are_hidden_are_not_over_and_the_users_filters_do_not_count(tmp_path, squeue, monkeypatch):
    squeue("")
    assert held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))
    squeue("${SQUEUE_STATES:-CANCELLED}")
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    slurm_job._answers.clear()
    assert not held(silent(tmp_path / "lock", ELSEWHERE, locks.SILENT_SECONDS + 1))
