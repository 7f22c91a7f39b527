"""The roll-out benchmark runs on a CPU with a tiny model."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_all_implementations_are_measured_and_stored(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_rollout.py", "--shape", "tiny", "--prompts", "3", "--new-tokens", "4"]
    done = subprocess.run(
        [*command, "--repeats", "1", "--peers", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "rollout.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {row["implementation"] for row in rows if row["direction"] == "generate"}
    assert names == {"posttrain", "generate_dynamic", "generate_static_compile"}
    parts = {row["direction"] for row in rows if row["implementation"] == "posttrain"}
    assert parts == {"generate", "warmup", "prefill", "step", "model", "sampling"}
    assert all(float(row["median_ms"]) > 0 for row in rows if row["direction"] in ("generate", "step", "model"))
