"""A training stage under several engines through the real command: same loss curve, tokens a second, memory a rank.

    python scripts/bench_engines.py --out DIR --recipe x_ecomla --stage distill --arms gpu:1 zero2:1 fsdp2:1 \\
        --set scale=gpu1 model.path=SmolLM2-135M-Instruct stages.distill.max_steps=60 --csv docs/results
    python scripts/bench_engines.py --out DIR --arms cpu:1 ddp:2 fsdp2:2 --device cpu --set scale=smoke  # smoke test
    python scripts/bench_engines.py --out DIR --arms ddp:1 ddp:2 --kill 2 --set …   # and a rank killed, then resumed

An arm is ENGINE:RANKS. What comes before the stage is made once. Every arm forces the stage anew and reads its manifest
and history; the first arm is the reference of the others. Efficiency is tokens a second over ranks times those of the
same engine at one rank. Memory planned is `posttrain plan`'s, a rank. Each final model is loaded by plain transformers
in a process of its own that cannot import posttrain.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
AutoTokenizer.from_pretrained(folder)
ids = torch.arange(3, 35)[None]
assert torch.isfinite(model(ids).logits).all() and "posttrain" not in sys.modules
"""


@dataclass
class Row:
    """What one arm came to. Differences are relative, the largest over all steps, against the first arm's curve."""

    arm: str
    device: str
    ranks: int
    steps: int
    first_loss: float
    last_loss: float
    loss_difference: float
    grad_norm_difference: float
    tokens_per_second: float
    efficiency: float | None
    peak_gib: float
    planned_gib: float
    loads_in_transformers: bool
    resumed_difference: float | None = None


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out.absolute()
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self.out.mkdir(parents=True, exist_ok=True)

    def words(self, engine: str, ranks: int) -> list[str]:
        words = [self.arguments.recipe, *self.arguments.set, f"paths.outputs={self.out}", f"engine={engine}"]
        if self.arguments.device:
            words.append(f"engine.device={self.arguments.device}")
        return words if ranks == 1 and engine in ("cpu", "gpu", "auto") else [*words, f"engine.ranks={ranks}"]

    def posttrain(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posttrain", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if check and done.returncode:
            sys.exit(f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    def run(self, engine: str, ranks: int, name: str) -> tuple[dict[str, Any], list[dict[str, float]], Path]:
        """The stage under one engine: manifest, history and folder of its artifact."""
        stage, words = self.arguments.stage, self.words(engine, ranks)
        self.posttrain("run", *words, "--until", stage, "--force", stage, "--name", name, "--yes")
        return self.artifact(name)

    def artifact(self, name: str) -> tuple[dict[str, Any], list[dict[str, float]], Path]:
        folder = (self.out / "runs" / name / "artifacts" / self.arguments.stage).resolve()
        manifest = json.loads((folder / "manifest.json").read_text())
        lines = (folder / "history" / "history.jsonl").read_text().splitlines()
        return manifest, [json.loads(line) for line in lines], folder

    def planned(self, engine: str, ranks: int) -> float:
        """GiB a rank; on the host the plan is of all ranks together."""
        plan = json.loads(self.posttrain("plan", *self.words(engine, ranks), "--json").stdout)
        (stage,) = (one for one in plan["stages"] if one["name"] == self.arguments.stage)
        total = sum(stage["estimate"]["memory"].values()) / GIB
        return total / ranks if self.arguments.device == "cpu" else total

    def loads(self, folder: Path) -> bool:
        environment = {name: value for name, value in self.environment.items() if name != "PYTHONPATH"}
        site = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and ROOT not in
                (Path(path).resolve(), Path(path).resolve().parent)]  # fmt: skip
        environment["PYTHONPATH"] = os.pathsep.join(site)
        command = [sys.executable, "-c", LOAD, str(folder / "model")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            print(done.stderr[-1500:], flush=True)
        return done.returncode == 0

    def killed(self, engine: str, ranks: int, name: str, step: int) -> list[dict[str, float]]:
        """The history of a run of which the last rank is killed after a step and that is resumed then."""
        stage, words = self.arguments.stage, self.words(engine, ranks)
        command = ["run", *words, f"stages.{stage}.save_every=2", "--until", stage, "--force", stage, "--name", name]
        process = subprocess.Popen(
            [sys.executable, "-m", "posttrain", *command, "--yes"],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        events = self.out / "runs" / name / "events.jsonl"
        while not (events.exists() and f'"step": {step},' in events.read_text()):
            if process.poll() is not None:
                sys.exit(f"the run that was to be killed ended by itself with {process.returncode}")
            time.sleep(0.05)
        began = time.monotonic()
        os.kill(rank_process(ranks - 1), signal.SIGKILL)
        code = process.wait()
        print(
            f"killed rank {ranks - 1} after step {step}: exit {code} after {time.monotonic() - began:.1f} s", flush=True
        )
        self.posttrain("resume", name, "--outputs", str(self.out))
        return self.artifact(name)[1]


def rank_process(rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"posttrain.launch.rank" not in (folder / "cmdline").read_bytes():
                continue
            if f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    sys.exit(f"there is no rank {rank}")


def difference(one: list[dict[str, float]], other: list[dict[str, float]], name: str) -> float:
    """The largest relative difference of two curves."""
    pairs = zip(one, other, strict=True)
    return max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-12) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="x_ecomla")
    parser.add_argument("--stage", default="distill")
    parser.add_argument("--arms", nargs="+", required=True, metavar="ENGINE:RANKS")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="engine.device, where the engine's own will not do")
    parser.add_argument("--kill", type=int, metavar="STEP", help="arms of several ranks once more, killed and resumed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--csv", type=Path, help="folder for bench_engines_STAGE.csv and the curves")
    arguments = parser.parse_args()
    bench, rows, curves = Bench(arguments), [], {}
    speeds: dict[str, float] = {}
    for number, arm in enumerate(arguments.arms):
        engine, _, ranks = arm.partition(":")
        count, name = int(ranks or 1), f"{number}-{engine}-{ranks or 1}"
        began = time.monotonic()
        manifest, history, folder = bench.run(engine, count, name)
        reference = curves.setdefault("reference", history)
        curves[arm] = history
        timing = manifest["metrics"]["timing"]
        speed = timing["tokens_per_second"]
        if count == 1:
            speeds[engine] = speed
        alone = speeds.get(engine)
        row = Row(
            arm=arm,
            device=manifest["host"].get("gpu") or manifest["engine"]["device"],
            ranks=count,
            steps=len(history),
            first_loss=history[0]["loss"],
            last_loss=history[-1]["loss"],
            loss_difference=difference(reference, history, "loss"),
            grad_norm_difference=difference(reference, history, "grad_norm"),
            tokens_per_second=speed,
            efficiency=None if alone is None else speed / (count * alone),
            peak_gib=timing["peak_memory_bytes"] / GIB,
            planned_gib=bench.planned(engine, count),
            loads_in_transformers=bench.loads(folder),
        )
        if arguments.kill and count > 1:
            resumed = bench.killed(engine, count, f"{name}-killed", arguments.kill)
            row.resumed_difference = difference(history, resumed, "loss")
        rows.append(row)
        print(f"{time.monotonic() - began:.0f} s  {json.dumps(asdict(row))}", flush=True)
        if arguments.csv:
            write(arguments.csv, arguments.stage, rows, curves)


def write(folder: Path, stage: str, rows: list[Row], curves: dict[str, list[dict[str, float]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"bench_engines_{stage}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    kept = {arm: [[one["loss"], one["grad_norm"]] for one in history] for arm, history in curves.items()}
    (folder / f"bench_engines_{stage}_curves.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main()
