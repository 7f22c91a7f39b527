"""How long the light commands take beside `python -c "import hydra"`, medians of one run.

python scripts/cli_speed.py [REPEATS=7]
"""

from __future__ import annotations

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


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["import hydra"])
    for name, values in seconds.items():
        print(f"{name:26} {statistics.median(values):.3f} s  {statistics.median(values) / base:.2f}x")


if __name__ == "__main__":
    main()
