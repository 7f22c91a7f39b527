"""The step benchmark runs on a CPU with a tiny model, whole and part by part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_step_and_its_parts_are_measured(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_distill_step.py", "--shape", "tiny", "--batch", "2", "--sequence", "64"]
    command += ["--steps", "3", "--warmup", "1", "--variants", "ours", "--parts", "--json", str(tmp_path / "m.json")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / "m.json").read_text())
    assert measured["rows"][0]["median_ms"] > 0
    parts = measured["parts"]["ours"]
    names = {"teacher forward", "student forward", "loss", "backward", "clipping", "optimiser"}
    assert parts["ms"].keys() == names
    assert all(milliseconds > 0 for milliseconds in parts["ms"].values())
    held = parts["held_gib"]
    assert held["gradients"] == held["weights"] == held["teacher"] > 0  # all fp32
    assert held["moments"] >= 2 * held["weights"]
