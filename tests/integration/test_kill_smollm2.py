"""The kill test on the real model (minutes, gigabytes): `pytest -m slow tests/integration/test_kill_smollm2.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import (
    copy_store_without,
    deterministic_part,
    kill,
    posttrain,
    start_and_pause,
    thaw,
)

from posttrain.paths import user_cache

RUN = [
    "run",
    "x_ecomla",
    "scale=demo",
    "~stages.evaluate_converted",
    "~stages.prefer",
    "~stages.evaluate",
    "stages.distill.max_steps=4",
    "stages.distill.tokens_per_step=256",
    "stages.distill.save_every=1",
    "data.python.max_bytes=2_000_000",
    "stages.upcycle.calibration_tokens=2048",
]
CONVERTED = user_cache() / "models"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not CONVERTED.exists(), reason="the converted SmolLM2 is not in the user's cache: `make demo` first"
)
def test_smollm2_killed_inside_saves_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.DEADLINE", 900.0)
    for name in ("undisturbed", "worker", "runner"):
        (tmp_path / name / "cache").mkdir(parents=True)
        os.symlink(CONVERTED, tmp_path / name / "cache" / "models")
    undisturbed = tmp_path / "undisturbed" / "outputs"
    posttrain(*RUN, cwd=undisturbed.parent)
    for victim in ("worker", "runner"):
        folder = tmp_path / victim
        copy_store_without(undisturbed, folder / "outputs", "distill")
        runner, pid = start_and_pause(*RUN, cwd=folder, opening="*/checkpoints/checkpoint-*/*COMPLETE*")
        kill(pid if victim == "worker" else runner.pid)
        thaw(pid)
        assert runner.wait(timeout=60) != 0
        posttrain("resume", cwd=folder)
        assert deterministic_part(folder / "outputs", "distill") == deterministic_part(undisturbed, "distill")
