"""Tables and plots of `riskpo_study.py`: pass@k by arm, paired differences, entropy where accuracy is equal."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy

from posttrain.methods.evaluation.pass_at_k import pass_at_k

PAIRS = (
    ("dr_grpo", "grpo"),
    ("rb", "grpo"),
    ("paper", "grpo"),
    ("rb", "dr_grpo"),
    ("rb", "paper"),
    ("rb_stratified", "rb"),
    ("question", "rb"),
    ("question", "grpo"),
)
RESAMPLES, WINDOW = 4000, 15
KEPT = ("step", "reward", "entropy", "grad_norm", "questions/zero_variance", "completions/mean_length")

Study = dict[str, dict[int, dict[str, Any]]]


def report(results: Path, to: Path) -> None:
    """Write `tables.md`, plots and the figures behind them, without the histories' other columns, to a folder."""
    study, taught = read(results)
    to.mkdir(parents=True, exist_ok=True)
    problems = sorted(taught["correct"])
    lines = [*outcome(study, taught, problems), "", *differences(study, problems), "", *levels(study, taught, problems)]
    lines += ["", *matched(study)]
    (to / "tables.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(study, to / "entropy.png")
    kept = to / "results"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    for arm, by_seed in {**study, "taught": {0: taught}}.items():
        for seed, found in by_seed.items():
            (kept / f"{arm}-{seed}.json").write_text(json.dumps(compact(found, problems)), encoding="utf-8")


def read(results: Path) -> tuple[Study, dict[str, Any]]:
    """Arms by seed, and the model they start from."""
    study: Study = defaultdict(dict)
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["arm"] != "taught":
            study[found["arm"]][found["seed"]] = found
    return dict(study), json.loads((results / "taught.json").read_text(encoding="utf-8"))


def compact(found: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """What the tables are made of."""
    history = [{key: round(row[key], 6) for key in KEPT if key in row} for row in found.get("history", ())]
    own = {key: found[key] for key in ("arm", "seed", "settings", "timing", "seconds", "samples") if key in found}
    return {**own, "correct": [found["correct"][problem] for problem in problems], "history": history}


def estimates(found: dict[str, Any], problems: list[str], k: int) -> numpy.ndarray:
    """pass@k of every problem [P]."""
    table = [pass_at_k(found["samples"], correct, k) for correct in range(found["samples"] + 1)]
    return numpy.array([table[found["correct"][problem]] for problem in problems])


def outcome(study: Study, taught: dict[str, Any], problems: list[str]) -> list[str]:
    lines = ["| arm | seeds | pass@1 | pass@4 | pass@16 | entropy, last 15 steps | training reward, last 15 steps |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    start = [100 * estimates(taught, problems, k).mean() for k in (1, 4, 16)]
    lines.append("| taught (before) | – | " + " | ".join(f"{value:.1f}" for value in start) + " | – | – |")
    for arm, by_seed in study.items():
        cells = [spread([100 * estimates(one, problems, k).mean() for one in by_seed.values()]) for k in (1, 4, 16)]
        for name, digits in (("entropy", 3), ("reward", 3)):
            last = [[row[name] for row in one["history"][-WINDOW:]] for one in by_seed.values()]
            cells.append(spread([float(numpy.mean(values)) for values in last], digits))
        lines.append(f"| {arm} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float], digits: int = 1) -> str:
    low, high = min(values), max(values)
    return f"{numpy.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def differences(study: Study, problems: list[str]) -> list[str]:
    """Paired by problem and seed; problems and seeds are drawn together."""
    lines = ["| difference, points | pass@1 | pass@4 | pass@16 |", "| --- | --- | --- | --- |"]
    for first, second in PAIRS:
        seeds = sorted(set(study.get(first, {})) & set(study.get(second, {})))
        if not seeds:
            continue
        cells = []
        for k in (1, 4, 16):
            pairs = [
                estimates(study[first][seed], problems, k) - estimates(study[second][seed], problems, k)
                for seed in seeds
            ]
            low, high = interval(100 * numpy.array(pairs))
            verdict = "no difference detected" if low <= 0 <= high else "differs"
            cells.append(f"{100 * numpy.mean(pairs):+.2f} ({low:+.2f} to {high:+.2f}): {verdict}")
        lines.append(f"| {first} - {second} | " + " | ".join(cells) + " |")
    return lines


def interval(values: numpy.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of [seeds, problems], both drawn with replacement."""
    rng = numpy.random.default_rng(0)
    seeds, problems = values.shape
    means = []
    for _ in range(RESAMPLES):
        rows = rng.integers(seeds, size=seeds)
        means.append(values[rows].mean(0)[rng.integers(problems, size=problems)].mean())
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def levels(study: Study, taught: dict[str, Any], problems: list[str]) -> list[str]:
    kinds = sorted(set(taught["levels"].values()))
    lines = ["| pass@1 by task/level | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for arm, by_seed in {"taught": {0: taught}, **study}.items():
        cells = []
        for kind in kinds:
            own = [problem for problem in problems if taught["levels"][problem] == kind]
            cells.append(f"{100 * numpy.mean([estimates(one, own, 1).mean() for one in by_seed.values()]):.1f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def smooth(found: dict[str, Any], name: str) -> numpy.ndarray:
    values = numpy.array([row[name] for row in found["history"]])
    return numpy.convolve(values, numpy.ones(WINDOW) / WINDOW, mode="valid")


def matched(study: Study) -> list[str]:
    """Entropy when the smoothed training reward first reaches a level."""
    tops = [smooth(one, "reward").max() for by_seed in study.values() for one in by_seed.values()]
    marks = [round(value, 3) for value in numpy.quantile(tops, [0.0, 0.5])]
    lines = [
        "| entropy where the training reward first reaches | " + " | ".join(f"{mark:.3f}" for mark in marks) + " |"
    ]
    lines += ["| --- |" + " --- |" * len(marks)]
    for arm, by_seed in study.items():
        cells = []
        for mark in marks:
            found = []
            for one in by_seed.values():
                reached = numpy.flatnonzero(smooth(one, "reward") >= mark)
                if len(reached):
                    found.append((float(smooth(one, "entropy")[reached[0]]), int(reached[0]) + WINDOW))
            if not found:
                cells.append("not reached")
                continue
            steps = numpy.mean([step for _, step in found])
            cells.append(f"{spread([value for value, _ in found], 3)} at step {steps:.0f}, {len(found)} seeds")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def plot(study: Study, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (arm, by_seed) in enumerate(study.items()):
        rewards = numpy.mean([smooth(one, "reward") for one in by_seed.values()], axis=0)
        entropies = numpy.mean([smooth(one, "entropy") for one in by_seed.values()], axis=0)
        color = f"C{number}"
        left.plot(numpy.arange(len(rewards)) + WINDOW, rewards, color=color, label=arm)
        right.plot(rewards, entropies, color=color, label=arm)
    left.set(xlabel="step", ylabel=f"training reward (mean of {WINDOW} steps and all seeds)")
    right.set(xlabel="training reward", ylabel="entropy, nats a token")
    right.legend()
    figure.savefig(path, dpi=120)
