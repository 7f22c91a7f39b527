"""Does alignment help a hybrid, and which layers should stay attention? Arms x shares x seeds at equal tokens.

    python scripts/hybrid_study.py run --out study --parallel 6 --gpus 2 --limit 560 \\
        --words scale=gpu1 engine=gpu model.path=M
    python scripts/hybrid_study.py report --out study --to docs/results/hybrid_study

Every arm is the recipe `zebra_llama` with a few overrides, and all arms share one store: what two of them have in
common is computed once, by whichever comes first. Runs that are done are left out, so that the same command goes on
where a time limit ended it. Tokens are equal: an arm without alignment gets the tokens of both alignments as
distillation. What came out is in `OUT/results`, a file a run; the report needs no more.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ILD_TOKENS, TRAIN_TOKENS, STEP_TOKENS = 1_000_000, 4_000_000, 16_384
"""Tokens of each of the two alignments and of the distillation, and of a step."""

NOT_ALIGNED = [
    "~stages.align_state",
    "~stages.align_latent",
    "stages.select.inputs.state=state.model",
    "stages.select.inputs.attention=latent.model",
    "stages.assemble.inputs.state=state.model",
    "stages.assemble.inputs.attention=latent.model",
]
UNIFORM = ["stages.select.method=uniform"]
ALIGNED_START = ["stages.state.init=aligned", "stages.state.inputs.data=data.train"]
ARMS: dict[str, list[str]] = {
    "smart": [],
    "uniform": UNIFORM,
    "greedy_kl": ["stages.select.method=greedy_kl"],
    "uniform_no_ild": [*UNIFORM, *NOT_ALIGNED],
    "uniform_aligned_init": [*UNIFORM, *ALIGNED_START],
    "uniform_aligned_init_no_ild": [*UNIFORM, *NOT_ALIGNED, *ALIGNED_START],
}
"""Overrides of the recipe; where an arm says nothing: published start, both alignments, `smart`. The starts and the
alignment are compared on the same layers, evenly spread: scores of models that were not aligned would choose others."""
SHARES = (0.25, 0.5)


def overrides(arm: str, share: float, seed: int, options: argparse.Namespace) -> list[str]:
    """Everything behind `posttrain run zebra_llama` for one run."""
    aligned, kept = options.ild_tokens // options.step_tokens, options.tokens // options.step_tokens
    no_ild = "~stages.align_state" in ARMS[arm]
    words = [
        "~stages.prefer",
        "~datasets.pairs",
        "stages.evaluate.inputs.model=distill.model",
        f"seed={seed}",
        f"stages.select.keep_fraction={share}",
        f"stages.distill.max_steps={kept + (2 * aligned if no_ild else 0)}",
        f"stages.distill.tokens_per_step={options.step_tokens}",
    ]
    if not no_ild:
        for stage in ("align_state", "align_latent"):
            words += [f"stages.{stage}.max_steps={aligned}", f"stages.{stage}.tokens_per_step={options.step_tokens}"]
    if options.needle:
        words.append(f"stages.evaluate.needle={options.needle}")
    return [*words, *ARMS[arm], *options.words]


def run(options: argparse.Namespace) -> int:
    """Start runs, `--parallel` at a time, until none is left or the time is up; the exit code is 1 if one failed."""
    jobs = [(arm, share, seed) for seed in options.seeds for share in options.shares for arm in options.arms]
    waiting = [job for job in jobs if not keep(options, *job)]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done before", flush=True)
    running: dict[subprocess.Popen[bytes], tuple[tuple[str, float, int], int]] = {}
    places = [gpu for _ in range(options.parallel) for gpu in range(options.gpus)]
    began, failed = time.monotonic(), 0
    options.out.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        late = options.limit and time.monotonic() - began > options.limit
        if late:
            # What a stage has saved stays; the next command goes on from it.
            for process in running:
                process.send_signal(signal.SIGTERM)
            waiting.clear()
        while waiting and places:
            job, gpu = waiting.pop(0), places.pop(0)
            running[start(job, gpu, options)] = job, gpu
        time.sleep(0.5)
        for process in [process for process in running if process.poll() is not None]:
            job, gpu = running.pop(process)
            places.append(gpu)
            found = keep(options, *job)
            failed += found is None and not late
            said = f"KL {found['result']['kl']:.4f}" if found else f"ended with {process.returncode}"
            print(f"{time.monotonic() - began:6.0f} s  {name(*job):32} {said}", flush=True)
    return int(failed > 0)


def start(job: tuple[str, float, int], gpu: int, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain", "run", "zebra_llama", *overrides(*job, options), "--yes"]
    command += ["--name", name(*job), f"paths.outputs={options.out.absolute()}"]
    log = (options.out / f"{name(*job)}.log").open("ab")
    threads = max(1, (os.cpu_count() or 2) // (options.parallel * options.gpus))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if options.gpus > 1:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)


def name(arm: str, share: float, seed: int) -> str:
    return f"{arm}-{round(100 * share)}-{seed}"


def keep(options: argparse.Namespace, arm: str, share: float, seed: int) -> dict[str, Any] | None:
    """What a finished run came to, also written to `results`; None while it is not finished."""
    path = options.out / "results" / f"{name(arm, share, seed)}.json"
    words = overrides(arm, share, seed, options)
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["words"] != words:
            raise SystemExit(f"{path} is of another study ({' '.join(found['words'])}): give another --out")
        return found
    record = options.out / "runs" / name(arm, share, seed) / "run.json"
    if not record.is_file():
        return None
    stages = {stage["name"]: stage for stage in json.loads(record.read_text(encoding="utf-8"))["stages"]}
    folders = {key: options.out / "store" / stage["type"] / stage["key"] for key, stage in stages.items()}
    if not (folders["evaluate"] / "manifest.json").is_file():
        return None
    made = {key: json.loads((folders[key] / "manifest.json").read_text(encoding="utf-8")) for key in stages}
    tokens = made["distill"]["config"]["tokens_per_step"]
    lines = (folders["distill"] / "history" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    steps = map(json.loads, lines)
    before = sum(
        config["max_steps"] * config["tokens_per_step"]
        for config in (made[key]["config"] for key in made if made[key]["type"] == "ild")
    )
    found = {
        **{
            "words": words,
            "arm": arm,
            "attention": share,
            "seed": seed,
            "kept": made["select"]["metrics"]["result"]["kept"],
        },
        **{"result": made["evaluate"]["metrics"]["result"], "tokens_before": before},
        "curve": [(step["step"] * tokens, step["loss"]) for step in steps],
        "seconds": {key: made[key]["seconds"] for key in made},
        "device": made["distill"]["host"].get("gpu") or made["distill"]["engine"]["device"],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, help="folder for the report")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--tokens", type=int, default=TRAIN_TOKENS, help="of the distillation")
    parser.add_argument("--ild-tokens", type=int, default=ILD_TOKENS, help="of each alignment")
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS)
    parser.add_argument("--needle", default="", help="override for stages.evaluate.needle, e.g. {lengths:[2048,8192]}")
    parser.add_argument("--parallel", type=int, default=4, help="runs at once on a GPU")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=0, help="seconds after which runs are stopped and saved")
    parser.add_argument("--words", nargs="*", default=["scale=gpu1"], help="further overrides of every run")
    options = parser.parse_args()
    if options.command == "report" and options.to is None:
        parser.error("report needs --to")
    if options.command == "run":
        return run(options)
    from hybrid_study_report import report

    report(options.out / "results", options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
