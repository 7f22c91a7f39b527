"""Toy stages for every test of the pipeline, and a cache of its own."""

from __future__ import annotations

import pytest
import toy_stages


@pytest.fixture(autouse=True)
def _toys(monkeypatch, tmp_path):
    toy_stages.register(monkeypatch)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
