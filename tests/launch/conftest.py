"""Toy stages in worker processes of their own, a stand-in for the report, and a cache of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toy_stages

import posttrain.report
from posttrain.launch import local


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
