"""Toy stages in worker processes of their own, stand-ins for the report and for Slurm, and a cache of its own."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import toy_stages
from fake_slurm import FakeSlurm

import posttrain.report
from posttrain.launch import local
from posttrain.launch.signals import Interrupts
from posttrain.launch.slurm import stage_job


@pytest.fixture(autouse=True)
def _toys(monkeypatch, tmp_path):
    toy_stages.register(monkeypatch)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    script = str(Path(toy_stages.__file__).with_name("toy_worker.py"))
    monkeypatch.setattr(local, "worker_command", lambda work_dir: [sys.executable, script, str(work_dir)])


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """The run folders for which a report was built."""
    built = []

    def build(run_dir):
        built.append(run_dir)
        path = run_dir / "report.html"
        path.write_text("<html></html>")
        return path

    monkeypatch.setattr(posttrain.report, "build", build, raising=False)
    return built


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    return fake


@pytest.fixture
def job(slurm, monkeypatch):
    """Runs a stage as its job would, in this process; the fake queue is told how it ended."""

    def run(made, stage, restarts=0, act=None, **options):
        number = [event["job"] for event in made.run_dir.events() if event["event"] == "stage_submitted"]
        names = [event["stage"] for event in made.run_dir.events() if event["event"] == "stage_submitted"]
        own = dict(zip(names, number, strict=True))[stage]
        if "_" not in own:
            monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        # That of an array's last task is the number of the array.
        monkeypatch.setenv("SLURM_JOB_ID", own.partition("_")[0])
        monkeypatch.setenv("SLURMD_NODENAME", "n7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        slurm.set(own, "RUNNING")
        acting = threading.Thread(target=act, daemon=True) if act is not None else None
        if acting is not None:
            acting.start()
        with Interrupts() as interrupts:
            code = stage_job.main(made.run_dir.path, stage, interrupts, **options)
        if acting is not None:
            acting.join(30)
        slurm.set(own, {0: "COMPLETED", 75: "PENDING"}.get(code, "FAILED"))
        return code

    return run
