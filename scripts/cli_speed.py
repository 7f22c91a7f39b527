"""How long the light commands take beside `python -c "import hydra"`: wall clock and CPU, medians of one run.

python scripts/cli_speed.py [REPEATS=7]
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import hydra": [sys.executable, "-c", "import hydra"],
    "--help": [sys.executable, "-m", "posttrain", "--help"],
    "list": [sys.executable, "-m", "posttrain", "list"],
    "show x_ecomla": [sys.executable, "-m", "posttrain", "show", "x_ecomla"],
    "plan x_ecomla": [sys.executable, "-m", "posttrain", "plan", "x_ecomla"],
    "plan x_ecomla scale=demo": [sys.executable, "-m", "posttrain", "plan", "x_ecomla", "scale=demo"],
}
# Without cached bytecode every start would compile this package anew, and only this package.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def measure(command: list[str]) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one command."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        measure(command)
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            measured[name].append(measure(command))
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in measured.items()
    }
    base = medians["import hydra"]
    for name, (wall, cpu) in medians.items():
        print(f"{name:26} wall {wall:.3f} s  {wall / base[0]:.2f}x   CPU {cpu:.3f} s  {cpu / base[1]:.2f}x")


if __name__ == "__main__":
    main()
