"""RiskPO on tabular bandits: entropy and pass@16 of several estimators when they are equally accurate.

Each question is a softmax over arms of which one is right; a step samples G answers of every question and follows the
package's advantages. Entropy is compared at equal accuracy, since the estimators move at different speeds.

    python scripts/riskpo_bandit.py --plot docs/results/riskpo_bandit.svg   # all
    python scripts/riskpo_bandit.py --seeds 1 --arms rb                     # one run
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.methods.riskpo import PRESETS, RiskSettings, make_tracker, risk_advantages

_NEUTRAL = PRESETS["neutral"]["risk"]
_PAPER = PRESETS["paper"]["risk"]
_OURS = PRESETS["rb"]["risk"]
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": _NEUTRAL,
    "Dr.GRPO": {**_NEUTRAL, "scale": "none"},
    "shared + natural": _PAPER,
    "shared + copy mean": {**_PAPER, "baseline": "copy_mean"},
    "rb": {**_PAPER, "credit": "rb"},
    "released sum-mean": PRESETS["released_dapo"]["risk"],
    "released std + natural": PRESETS["released_math"]["risk"],
    "rb, histogram (our default)": _OURS,
    "rb + stratified": {**_OURS, "bundles": "stratified"},
    "rb + anti-stratified": {**_OURS, "bundles": "anti_stratified"},
    "question level": {"level": "question"},
}
"""Settings by row. The first seven are the card's, its bundle rows with the paper's tracked quantiles."""

CARD = {
    "GRPO": (1.10, 0.715, 140),
    "Dr.GRPO": (1.09, 0.710, 388),
    "shared + natural": (0.77, 0.678, 575),
    "shared + copy mean": (1.06, 0.710, 574),
    "rb": (1.08, 0.713, 510),
    "released sum-mean": (0.96, 0.679, 712),
    "released std + natural": (0.94, 0.593, 1128),
}
"""Entropy (nats), pass@16 and steps at 60 % accuracy in the method card, 6 seeds, learning rate and start not given."""


@dataclass(frozen=True)
class World:
    """The bandits and how they are trained."""

    questions: int = 100
    arms: int = 16
    generations: int = 10
    spread: float = 0.9  # standard deviation of the first logits of a question
    shift: float = -0.9  # what the right arm's logit gets on top, mean over the questions
    difficulty: float = 1.8  # and standard deviation
    lr: float = 0.3
    target: float = 0.6
    limit: int = 2000


@dataclass
class Run:
    """One run: mean accuracy and entropy by step, and pass@16 at its end."""

    accuracy: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    pass_at_16: float = math.nan

    @property
    def steps(self) -> int:
        return len(self.accuracy) - 1


def train(settings: RiskSettings, world: World, seed: int) -> Run:
    """Follow the advantages until the mean accuracy is `world.target`, or for `world.limit` steps. Arm 0 is right."""
    draws = torch.Generator().manual_seed(seed)
    logits = first_logits(world, draws)
    tracker, run, ema = make_tracker(settings), Run(), None
    for step in range(world.limit + 1):
        policy = logits.softmax(1)
        run.accuracy.append(float(policy[:, 0].mean()))
        run.entropy.append(float(-(policy * policy.clamp(min=1e-300).log()).sum(1).mean()))
        if run.accuracy[-1] >= world.target or step == world.limit:
            break
        answers = torch.multinomial(policy, world.generations, replacement=True, generator=draws)
        rewards = (answers == 0).double()
        found = risk_advantages(rewards, settings, tracker, seed=seed, step=step, difficulty=ema)
        rate = rewards.mean(1)
        ema = -rate if ema is None else 0.9 * ema - 0.1 * rate
        logits += world.lr * policy_gradient(policy, answers, found.advantages.double())
    run.pass_at_16 = float((1 - (1 - policy[:, 0]) ** 16).mean())
    return run


def first_logits(world: World, draws: torch.Generator) -> Tensor:
    """`[Q, arms]`, normal, the right arm being likelier on some questions than on others."""
    logits = world.spread * torch.randn(world.questions, world.arms, generator=draws, dtype=torch.float64)
    offsets = world.shift + world.difficulty * torch.randn(world.questions, generator=draws, dtype=torch.float64)
    logits[:, 0] += offsets
    return logits


def policy_gradient(policy: Tensor, answers: Tensor, advantages: Tensor) -> Tensor:
    """`[Q, arms]`: mean over the answers of advantage times the gradient of the answer's log-probability."""
    taken = torch.zeros_like(policy).scatter_add_(1, answers, advantages)
    return (taken - advantages.sum(1, keepdim=True) * policy) / answers.shape[1]


@dataclass(frozen=True)
class Row:
    """The runs of one arm at the target, a value a seed, and how many never got there."""

    name: str
    entropy: list[float]
    pass_at_16: list[float]
    steps: list[float]
    missed: int


def row_of(name: str, runs: Sequence[Run], world: World) -> Row:
    """Figures of the runs that reached the target."""
    there = [run for run in runs if run.accuracy[-1] >= world.target]
    return Row(
        name,
        [run.entropy[-1] for run in there],
        [run.pass_at_16 for run in there],
        [float(run.steps) for run in there],
        len(runs) - len(there),
    )


def said(values: Sequence[float], digits: int) -> str:
    """Mean and range; a dash for no values."""
    if not values:
        return "–"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def verdict(values: Sequence[float], published: float, digits: int) -> str:
    """Whether a figure of the card lies within the seeds' range; the card's figures are rounded."""
    half = 0.5 * 10**-digits
    inside = bool(values) and min(values) - half <= published <= max(values) + half
    return f"{published:.{digits}f} {'inside' if inside else 'outside'}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line an arm, ours beside the card's."""
    head = ("estimator", "entropy, nats", "card", "pass@16", "card", "steps", "card", "seeds that got there")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        ours = ((row.entropy, 2), (row.pass_at_16, 3), (row.steps, 0))
        published = CARD.get(row.name, (None,) * 3)
        cells = [row.name]
        for (values, digits), figure in zip(ours, published, strict=True):
            cells += [said(values, digits), "–" if figure is None else verdict(values, figure, digits)]
        lines.append("| " + " | ".join([*cells, f"{len(row.steps)} of {len(row.steps) + row.missed}"]) + " |")
    return lines


def draw(runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Entropy over accuracy, a colour an arm and a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "riskpo_bandit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for place, (name, group) in enumerate(runs.items()):
        for number, run in enumerate(group):
            # Some hundred points are a curve; thousands only make the file large.
            every = max(1, run.steps // 150)
            axes.plot(
                run.accuracy[::every],
                run.entropy[::every],
                color=pyplot.get_cmap("tab20")(place % 20),
                linewidth=0.8,
                label=name if number == 0 else None,
            )
    axes.set(xlabel="mean accuracy", ylabel="mean entropy of the policy, nats", title="Entropy at equal accuracy")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Train all arms and seeds, print the table, and draw the curves if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--plot", type=Path, help="where to draw entropy over accuracy")
    for name in ("questions", "arms_each", "generations", "limit"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name in ("spread", "shift", "difficulty", "lr", "target"):
        parser.add_argument(f"--{name}", type=float)
    given = parser.parse_args()
    names = {field.name: "arms_each" if field.name == "arms" else field.name for field in fields(World)}
    world = World(**{name: value for name, key in names.items() if (value := getattr(given, key)) is not None})
    torch.set_num_threads(1)
    started = time.perf_counter()
    runs = {arm: [train(RiskSettings(**ARMS[arm]), world, seed) for seed in range(given.seeds)] for arm in given.arms}
    seconds, count = time.perf_counter() - started, given.seeds * len(given.arms)
    print(world, f"seeds 0 to {given.seeds - 1}", f"{seconds / count:.2f} s a run", sep="\n", end="\n\n")
    print("\n".join(table([row_of(name, group, world) for name, group in runs.items()])))
    if given.plot:
        draw(runs, given.plot)


if __name__ == "__main__":
    main()
