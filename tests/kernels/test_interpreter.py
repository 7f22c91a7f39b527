"""Every file of `interpreted/` in a process whose triton runs on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", sorted(path.name for path in INTERPRETED.glob("interpreted_*.py")))
def test_triton_code_under_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", str(INTERPRETED / name), "-o", "python_files=interpreted_*.py"]
    # No device: tests there would otherwise mix interpreted and compiled code.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for key in [key for key in environment if key.startswith("PYTEST_")]:
        del environment[key]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
