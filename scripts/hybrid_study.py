"""Does alignment help a hybrid, and which layers should stay attention? Arms x shares x seeds at equal tokens.

    python scripts/hybrid_study.py run --out study --parallel 6 --limit 560 --words model.path=M data.path=D engine=gpu
    python scripts/hybrid_study.py report --out study --to docs/results/hybrid_study

Every arm is the recipe `zebra_llama` with a few overrides, and all arms share one store: what two of them have in
common is computed once, by whichever comes first. Runs that are done are left out, so that the same command goes on
where a time limit ended it. Tokens are equal: an arm without alignment gets the tokens of both alignments as
distillation.
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
ALIGNED_START = ["stages.state.init=aligned", "stages.state.inputs.data=data.train"]
ARMS: dict[str, list[str]] = {
    "smart": [],
    "uniform": ["stages.select.method=uniform"],
    "greedy_kl": ["stages.select.method=greedy_kl"],
    "no_ild": NOT_ALIGNED,
    "aligned_init": ALIGNED_START,
    "aligned_init_no_ild": [*NOT_ALIGNED, *ALIGNED_START],
}
"""Overrides of the recipe; where an arm says nothing: published start, both alignments, `smart`."""
SHARES = (0.25, 0.5)
FIGURES = ("perplexity", "kl", "top1_agreement")


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
    waiting = [job for job in jobs if result_of(options.out, name(*job)) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done before", flush=True)
    running: dict[subprocess.Popen[bytes], str] = {}
    began, failed = time.monotonic(), 0
    options.out.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        late = options.limit and time.monotonic() - began > options.limit
        if late:
            # What a stage has saved stays; the next command goes on from it.
            for process in running:
                process.send_signal(signal.SIGTERM)
            waiting.clear()
        while waiting and len(running) < options.parallel:
            job = waiting.pop(0)
            running[start(job, options)] = name(*job)
        time.sleep(0.5)
        for process in [process for process in running if process.poll() is not None]:
            done = running.pop(process)
            found = result_of(options.out, done)
            failed += found is None and not late
            said = f"KL {found['kl']:.4f}" if found else f"ended with {process.returncode}"
            print(f"{time.monotonic() - began:6.0f} s  {done:32} {said}", flush=True)
    return int(failed > 0)


def start(job: tuple[str, float, int], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "posttrain", "run", "zebra_llama", *overrides(*job, options), "--yes"]
    command += ["--name", name(*job), f"paths.outputs={options.out.absolute()}"]
    log = (options.out / f"{name(*job)}.log").open("ab")
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // options.parallel))}
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **threads})


def name(arm: str, share: float, seed: int) -> str:
    return f"{arm}-{round(100 * share)}-{seed}"


def result_of(out: Path, run_name: str) -> dict[str, Any] | None:
    """Result of a finished run's evaluation with what was chosen; None while there is none."""
    record = out / "runs" / run_name / "run.json"
    if not record.is_file():
        return None
    found: dict[str, Any] = {}
    for stage in json.loads(record.read_text(encoding="utf-8"))["stages"]:
        manifest = out / "store" / stage["type"] / stage["key"] / "manifest.json"
        if stage["name"] in ("evaluate", "select"):
            if not manifest.is_file():
                return None
            result = json.loads(manifest.read_text(encoding="utf-8"))["metrics"]["result"]
            found |= result if stage["name"] == "evaluate" else {"kept": result["kept"], "kl_chosen": result["kl_kept"]}
    return found or None


def report(options: argparse.Namespace) -> int:
    """A row a run as CSV, a row an arm and share as a Markdown table: mean over seeds, and each seed's figure."""
    rows = []
    for arm in options.arms:
        for share in options.shares:
            for seed in options.seeds:
                found = result_of(options.out, name(arm, share, seed))
                if found is not None:
                    figures = {figure: found[figure] for figure in FIGURES}
                    needles = {
                        key: value for key, value in found.items() if key.startswith("needle") and _number(value)
                    }
                    kept = " ".join(map(str, found["kept"]))
                    rows.append({"arm": arm, "attention": share, "seed": seed, **figures, **needles, "kept": kept})
    if not rows:
        raise SystemExit(f"no finished run in {options.out}")
    options.to.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (options.to / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    shown = [column for column in columns if column not in ("arm", "attention", "seed", "kept")]
    lines = [f"| arm | attention | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 3) + "|"]
    for arm, share in dict.fromkeys((row["arm"], row["attention"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["attention"]) == (arm, share)]
        cells = [_cell([row[column] for row in own if column in row]) for column in shown]
        lines.append(f"| {arm} | {share:.0%} | {len(own)} | {' | '.join(cells)} |")
    (options.to / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    each = f" ({', '.join(f'{value:.4g}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.4g}{each}"


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
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--limit", type=float, default=0, help="seconds after which runs are stopped and saved")
    parser.add_argument("--words", nargs="*", default=["scale=gpu1"], help="further overrides of every run")
    options = parser.parse_args()
    if options.command == "report" and options.to is None:
        parser.error("report needs --to")
    return {"run": run, "report": report}[options.command](options)


if __name__ == "__main__":
    sys.exit(main())
