"""A small real Slurm, and recipes of toy stages that the real command submits to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from plugin_packages import install
from toy_stages import TOYS

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster")
SECONDS = 120.0

# The toys compute nothing: without torch a worker starts in a fraction of the time. They have nothing to report either.
PLUGIN = """
import posttrain.report
from posttrain.launch import execute
from toy_stages import ToyEvaluate, ToySource, ToyTrain


def build(run_dir):
    (run_dir / "report.html").write_text("<html></html>")
    with (run_dir / "reports").open("a") as file:
        file.write("built\\n")
    return run_dir / "report.html"


execute.prepare_process = lambda seed, device: "cpu"
posttrain.report.build = build
"""
RECIPE = """
defaults: [base, _self_]
stages:
  source: {type: toy_source}
  train: {type: toy_train, inputs: {data: source.train}, steps: 8}
  evaluate: {type: toy_evaluate, inputs: {history: train.history, data: source.heldout}}
"""


class Site:
    """A folder to work in, with the toys installed, on a cluster (or on commands that pretend to be one)."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        packages = folder / "packages"
        points = {f"stages:{name}": f"toys_of_tests:{target.partition(':')[2]}" for name, target in TOYS.items()}
        install(packages, "toys-of-tests", points, {"toys_of_tests.py": PLUGIN})
        paths = [packages, ROOT / "tests", ROOT, ROOT / "kernels"]
        self.environment = {
            **environment,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "POSTTRAIN_CACHE": str(folder / "cache"),
        }
        self.recipe("toy", RECIPE)

    def recipe(self, name: str, text: str) -> None:
        (self.folder / f"{name}.yaml").write_text(text)

    def posttrain(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posttrain", *arguments]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        if check:
            assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "posttrain", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def submit(self, name: str, *overrides: str, recipe: str = "toy") -> SubmittedRun:
        done = self.posttrain("submit", f"./{recipe}.yaml", *overrides, "--yes", "--name", name)
        return SubmittedRun(self, name, done.stdout)

    def slurm(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout


class SubmittedRun:
    """A run by its folder."""

    def __init__(self, site: Site, name: str, said: str = "") -> None:
        self.site, self.name, self.said = site, name, said
        self.folder = site.folder / "outputs" / "runs" / name

    def events(self, kind: str | None = None, stage: str | None = None) -> list[dict]:
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "events.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return [e for e in found if (kind is None or e["event"] == kind) and (stage is None or e["stage"] == stage)]

    def job(self, stage: str) -> str:
        return self.events("stage_submitted", stage)[-1]["job"]

    def step(self, stage: str = "train") -> int:
        return max((event["step"] for event in self.events("metrics", stage)), default=0)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited too long for {what}\n{self.account()}"
            time.sleep(0.05)

    def wait_for_step(self, step: int, stage: str = "train") -> None:
        self.wait(lambda: self.step(stage) >= step, f"step {step} of {stage}")

    def wait_for_end(self, status: str = "done", seconds: float = SECONDS, times: int = 1) -> dict:
        self.wait(lambda: len(self.events("run_finished")) >= times, "the run's end", seconds)
        end = self.events("run_finished")[-1]
        assert end["status"] == status, f"{end}\n{self.account()}"
        return end

    def result(self, stage: str = "train") -> bytes:
        return (self.folder / "artifacts" / stage / "history" / "history.jsonl").read_bytes()

    def account(self) -> str:
        """Everything there is to know, for a failing test."""
        lines = [json.dumps(e) for e in self.events() if e["event"] not in ("progress", "metrics")]
        for path in sorted((self.folder / "slurm").glob("*.out")):
            lines += [f"--- {path.name}", path.read_text(errors="replace")[-3000:]]
        return "\n".join([*lines, self.site.slurm("squeue", check=False)])


@contextlib.contextmanager
def cluster(folder: Path, **settings: str) -> Iterator[dict[str, str]]:
    """A running cluster; the environment for its commands."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    settings = {f"TINYSLURM_{name}": value for name, value in settings.items()}
    subprocess.run([CLUSTER / "up.sh", folder], env={**clean, **settings}, check=True, timeout=300)
    try:
        yield {**clean, "SLURM_CONF": f"{folder}/slurm.conf"}
    finally:
        subprocess.run([CLUSTER / "down.sh", folder, "--purge"], env=clean, check=True, timeout=60)
