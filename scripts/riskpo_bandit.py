"""RiskPO on tabular bandits: entropy and pass@16 of several estimators when they are equally accurate.

Each question is a softmax over arms of which one is right; a step samples G answers of every question and follows the
package's advantages. Entropy is compared at equal accuracy, since the estimators move at different speeds.

    python scripts/riskpo_bandit.py                       # the table, and docs/results/riskpo_bandit.svg
    python scripts/riskpo_bandit.py --seeds 1 --arms rb   # one run
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.methods.riskpo import PRESETS, RiskSettings, make_tracker, risk_advantages

_NEUTRAL = PRESETS["neutral"]["risk"]
_SHARED = {"credit": "shared", "quantile_source": "ema_hist"}
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": _NEUTRAL,
    "Dr.GRPO": {**_NEUTRAL, "scale": "none"},
    "shared + natural": _SHARED,
    "shared + copy mean": {**_SHARED, "baseline": "copy_mean"},
    "rb": PRESETS["rb"]["risk"],
    "released sum-mean": PRESETS["released_dapo"]["risk"],
    "released std + natural": PRESETS["released_math"]["risk"],
    "rb + stratified": {**PRESETS["rb"]["risk"], "bundles": "stratified"},
    "question level": {"level": "question"},
}

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
    spread: float = 1.0  # standard deviation of the first logits of a question
    shift: float = -1.0  # what the right arm's logit gets on top, mean over the questions
    difficulty: float = 2.0  # and standard deviation
    lr: float = 0.3
    target: float = 0.6
    limit: int = 3000


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
    """Follow the advantages until the mean accuracy is `world.target`, or `world.limit` steps. Arm 0 is the right one."""
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
