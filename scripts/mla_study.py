"""Which MLA initialisation distils best? Arms x cache budgets x seeds from one source, several at once on one GPU.

    python scripts/mla_study.py prepare --source MODEL --train DATA/train --heldout DATA/heldout --work study
    python scripts/mla_study.py run --work study --stage screen --tokens 4e6 --parallel 4     # every arm and budget
    python scripts/mla_study.py run --work study --stage final --arms rorope_bkv paired xeco --budgets 64 \\
        --seeds 0 1 2 --tokens 15e6 --parallel 3
    python scripts/mla_study.py prepare … --work healed --heal-tokens 20e6   # from a healed source
    python scripts/mla_study.py report --work study --out docs/results/mla_study

`prepare` samples chats from the source with the graph-captured decoder, splits them by topic, cuts everything into
token blocks and, where asked, first trains the source itself in fp32 (weights that were rounded to 4 bits may bias the
choice of ranks). `run` starts one process an arm (`mla_study_arm.py`); results lie in WORK/STAGE/*.json, and arms that
have one are left out, so that a run can go on. DATA is a dataset folder of posttrain, e.g. of a run's `data` stage.
"""
# ruff: noqa: E402  (the checkout comes first on the path)

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from mla_study_arms import ARMS, BUDGETS

POLL_SECONDS = 0.5


def main() -> None:
    options = _arguments()
    {"prepare": prepare, "run": run, "report": report}[options.command](options)


def prepare(options: argparse.Namespace) -> None:
    from mla_study_prepare import prepare_study

    prepare_study(options)


def run(options: argparse.Namespace) -> None:
    """Run the arms that have no result yet, `--parallel` at a time, until none is left or the time is up."""
    folder = Path(options.work) / options.stage
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, budget, seed) for seed in options.seeds for budget in options.budgets for arm in options.arms]
    waiting = [job for job in jobs if not _result(folder, job).exists()]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done before")
    running: dict[subprocess.Popen[bytes], tuple[str, int, int]] = {}
    began, failed = time.monotonic(), 0
    while waiting or running:
        late = options.limit and time.monotonic() - began > options.limit
        while waiting and len(running) < options.parallel and not late:
            job = waiting.pop(0)
            running[_start(options, folder, job)] = job
        if not running:
            break
        time.sleep(POLL_SECONDS)
        for process in [process for process in running if process.poll() is not None]:
            job = running.pop(process)
            failed += process.returncode != 0
            print(f"{time.monotonic() - began:6.0f} s  {_said(folder, job, process.returncode)}", flush=True)
    if waiting:
        print(f"time is up: {len(waiting)} runs not started; the same command goes on with them")
    sys.exit(1 if failed else 0)


def _start(options: argparse.Namespace, folder: Path, job: tuple[str, int, int]) -> subprocess.Popen[bytes]:
    arm, budget, seed = job
    command = [sys.executable, str(ROOT / "scripts" / "mla_study_arm.py"), "--work", options.work, "--arm", arm]
    command += ["--budget", str(budget), "--seed", str(seed), "--tokens", str(int(options.tokens))]
    command += ["--lr", str(options.lr), "--batch-tokens", str(options.batch_tokens)]
    command += ["--sequence", str(options.sequence), "--points", str(options.points)]
    command += ["--out", str(_result(folder, job)), "--device", options.device]
    log = _result(folder, job).with_suffix(".log").open("wb")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // options.parallel))}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads})


def _result(folder: Path, job: tuple[str, int, int]) -> Path:
    arm, budget, seed = job
    return folder / f"{arm}-{budget}-{seed}.json"


def _said(folder: Path, job: tuple[str, int, int], code: int) -> str:
    name = _result(folder, job).stem
    if code:
        lines = _result(folder, job).with_suffix(".log").read_text(errors="replace").strip().splitlines() or ["nothing"]
        return f"{name:28} failed ({code}): {lines[-1]}"
    found = json.loads(_result(folder, job).read_text())
    first, last = found["curve"][0], found["curve"][-1]
    parts = [f"{kind} KL {first[kind]['kl']:.3f} -> {last[kind]['kl']:.3f}" for kind in ("text", "samples")]
    return f"{name:28} {', '.join(parts)}, {found['seconds']:.0f} s"


def report(options: argparse.Namespace) -> None:
    from mla_study_report import write_report

    write_report([Path(work) for work in options.work], Path(options.out))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--source", required=True, help="folder of a Llama-shaped model")
    first.add_argument("--train", required=True, help="dataset folder to train on")
    first.add_argument("--heldout", required=True, help="dataset folder to measure on")
    first.add_argument("--answers", type=int, default=8192, help="chats sampled from the source for training")
    first.add_argument("--heldout-answers", type=int, default=512)
    first.add_argument("--answer-tokens", type=int, default=256)
    first.add_argument("--heal-tokens", type=float, default=0, help="train the source itself on that many tokens first")
    first.add_argument("--heal-lr", type=float, default=1e-4)
    second = commands.add_parser("run")
    second.add_argument("--stage", required=True, help="name of the folder for the results")
    second.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    second.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help="cached elements r + d_r")
    second.add_argument("--seeds", nargs="+", type=int, default=[0])
    second.add_argument("--tokens", type=float, default=4e6)
    second.add_argument("--lr", type=float, default=5e-4)
    second.add_argument("--points", type=int, default=10, help="measurements on the way")
    second.add_argument("--parallel", type=int, default=3)
    second.add_argument("--limit", type=float, default=0, help="seconds after which no further run starts; 0: none")
    for command in (first, second):
        command.add_argument("--work", required=True)
        command.add_argument("--sequence", type=int, default=1024)
        command.add_argument("--batch-tokens", type=int, default=16384)
        command.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    third = commands.add_parser("report")
    third.add_argument("--work", required=True, nargs="+")
    third.add_argument("--out", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    random.seed(0)
    main()
