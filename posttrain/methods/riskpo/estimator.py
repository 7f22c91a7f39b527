"""Advantages of a batch of rewards under a risk measure: a function of rewards, settings and a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.methods.riskpo import bundles, credit
from posttrain.methods.riskpo.measure import score_function
from posttrain.methods.riskpo.presets import fill
from posttrain.methods.riskpo.quantiles import BatchQuantiles, BundleQuantiles, Tracker
from posttrain.methods.riskpo.settings import RiskSettings
from posttrain.methods.riskpo.weights import WEIGHTS, Rates


@dataclass(frozen=True)
class RiskAdvantages:
    """Advantages `[Q, G]`, float32 on the rewards' device, and what a log should have about them."""

    advantages: Tensor
    metrics: dict[str, float]


def advantages(
    rewards: Tensor,
    config: Any,
    tracker: Tracker | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    difficulty: Tensor | None = None,
) -> Tensor:
    """The advantages of `risk_advantages` alone, `[questions, generations]` like the rewards.

    Args:
        config: `RiskSettings`; a stage's config, which has them as `risk`; or a dict of the fields of either.
    """
    settings = settings_of(config)
    return risk_advantages(rewards, settings, tracker, seed=seed, step=step, difficulty=difficulty).advantages


def risk_advantages(
    rewards: Tensor,
    settings: RiskSettings,
    tracker: Tracker | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    difficulty: Tensor | None = None,
) -> RiskAdvantages:
    """What each answer's log-probability is to be weighted with, to raise the risk measure of `settings`.

    The tracker is updated with this batch's scores after it has been asked. Everything random depends on (seed, step)
    alone: equal rewards and states give equal advantages on every rank and after a resume.

    Args:
        rewards: `[Q, G]`, NaN where an answer could not be scored. In the sum of a bundle its question's mean stands
            for it, or the batch's mean if the question has no reward at all; its own advantage is 0. Sums with such a
            stand-in are not shown to the tracker.
        tracker: of `make_tracker`; without one, or before its first update, the batch's own quantiles are taken and
            the metric `quantiles_from_batch` is 1.
        difficulty: `[Q]`, larger is harder, for `bundles` other than random, and best from earlier steps: without it
            the batch's own mean rewards are taken, and an answer's reward has a say in who its bundle mates are.

    Raises:
        ValueError: rewards are not `[Q, G]` or not finite, Q is not a multiple of the bundle size, or pass_at_k has
            rewards other than 0 and 1 or a k above G.
    """
    values = _checked(rewards, settings)
    metrics = {"nan_share": float(values.isnan().double().mean())}
    if metrics["nan_share"] == 1:
        return RiskAdvantages(torch.zeros_like(rewards, dtype=torch.float32), metrics)
    metrics["zero_std_questions"] = float((credit.nanstd(values) < 1e-8).double().mean())
    source = tracker or (BundleQuantiles() if settings.quantile_source == "bundle" else BatchQuantiles())
    if settings.level == "question":
        result, found = _of_questions(values, settings, source)
    else:
        result, found = _of_bundles(values, settings, source, seed, step, difficulty)
    if settings.scale == "group_std":
        result = result / (credit.nanstd(values) + 1e-4)
    return RiskAdvantages(result.float().to(rewards.device), {**metrics, **found})


def settings_of(config: Any) -> RiskSettings:
    """The risk settings in a `RiskSettings`, in a stage's config, or in a dict of the fields of either."""
    if isinstance(config, RiskSettings):
        return config
    if not isinstance(config, Mapping):
        return settings_of(config.risk)
    filled = fill(config)
    inner = filled.get("risk")
    return RiskSettings(**filled) if inner is None or isinstance(inner, str) else settings_of(inner)


def _checked(rewards: Tensor, settings: RiskSettings) -> Tensor:
    values = rewards.detach().double().cpu()
    if values.dim() != 2 or not values.numel():
        raise ValueError(f"rewards are [questions, generations], not of shape {list(rewards.shape)}")
    if values.isinf().any():
        raise ValueError("rewards have to be finite, or NaN where an answer could not be scored")
    if settings.level == "bundle" and len(values) % settings.bundle_size:
        raise ValueError(f"{len(values)} questions are not a multiple of bundle_size={settings.bundle_size}")
    if settings.risk == "pass_at_k":
        if settings.k > values.shape[1]:
            raise ValueError(f"pass_at_k with k={settings.k} needs at least as many answers a question")
        if not ((values == 0) | (values == 1) | values.isnan()).all():
            raise ValueError("pass_at_k is of rewards 0 and 1")
    return values


def _of_bundles(
    values: Tensor, settings: RiskSettings, source: Tracker, seed: int, step: int, difficulty: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """`[Q, G]` before a division by the questions' deviations, and metrics."""
    mean = values.nanmean(1, keepdim=True)
    filled = torch.where(values.isnan(), torch.where(mean.isnan(), values.nanmean(), mean), values)
    hard = -filled.mean(1) if difficulty is None else difficulty.detach().double().cpu()
    size = settings.bundle_size
    made = bundles.bundle(*values.shape, size, strategy=settings.bundles, difficulty=hard, seed=seed, step=step)
    grouped = made.gather(values)  # [N, B, G]
    scores = made.gather(filled).sum(1)  # [N, G]
    complete = ~grouped.isnan().any(1)
    low, high, from_batch = _quantiles(source, settings, scores, size * filled.min(), size * filled.max())
    score = score_function(settings, low, high, scores)
    divisor = _divisor(settings, scores, low, high)
    if settings.credit == "rb":
        draws = bundles.generator(seed, step, bundles.DRAWS)
        shares = credit.rb(lambda sums: score(sums) / divisor, grouped, draws)
    else:
        phi = score(scores)
        centre = phi.mean(1, keepdim=True) if settings.baseline == "copy_mean" else 0.0
        shares = credit.RULES[settings.credit]((phi - centre) / divisor, grouped)
    source.update(scores[complete])
    return made.scatter(shares), {
        "phi_mean": float(score(scores).mean()),
        **_metrics(scores, low, high, from_batch),
    }


def _of_questions(values: Tensor, settings: RiskSettings, source: Tracker) -> tuple[Tensor, dict[str, float]]:
    """`[Q, G]` before a division by the questions' deviations, and metrics."""
    known = ~values.isnan()
    count = known.sum(1, keepdim=True) - 1
    centred = credit.leave_one_out(values)
    scores = values.nanmean(1)[known.any(1), None]  # [K, 1]
    lowest, highest = values[known].min(), values[known].max()
    low, high, from_batch = _quantiles(source, settings, scores, lowest, highest)
    rates = Rates(
        others=values.nan_to_num(0.0) - centred,
        count=count.double(),
        width=(highest - lowest) / count.clamp(min=1),
        questions=scores.flatten(),
        low=low,
        high=high,
    )
    weight = WEIGHTS[settings.risk](rates, settings)
    source.update(scores)
    return weight * centred / _divisor(settings, scores, low, high), {
        "weight_mean": float(weight[known].mean()),
        **_metrics(scores, low, high, from_batch),
    }


def _quantiles(
    source: Tracker, settings: RiskSettings, scores: Tensor, lowest: Tensor, highest: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """The source's; at the levels 0 and 1 no possible score lies outside, whatever was seen so far."""
    low, high, from_batch = source.quantiles(settings.alpha, settings.beta, scores)
    low = torch.minimum(low, lowest) if settings.alpha == 0 else low
    high = torch.maximum(high, highest) if settings.beta == 1 else high
    return low, high, from_batch


def _divisor(settings: RiskSettings, scores: Tensor, low: Tensor, high: Tensor) -> Tensor | float:
    if settings.scale == "bundle_std":
        return credit.nanstd(scores) + 1e-6
    if settings.scale not in ("batch_std", "quantile_range"):
        return 1.0
    size = high - low if settings.scale == "quantile_range" else credit.nanstd(scores.flatten())
    return torch.where(size > 1e-6, size, 1.0)


def _metrics(scores: Tensor, low: Tensor, high: Tensor, from_batch: bool) -> dict[str, float]:
    return {
        "q_alpha": float(low.mean()),
        "q_beta": float(high.mean()),
        "score_mean": float(scores.mean()),
        "share_below": float((scores < low).double().mean()),
        "share_above": float((scores > high).double().mean()),
        "quantiles_from_batch": float(from_batch),
    }
