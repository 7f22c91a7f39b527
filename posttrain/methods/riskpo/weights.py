"""Risk over questions: with p a question's mean reward, every measure is a weight w(p) on `r - mean of the others`.

The gradient of a measure of the distribution of p over questions is `E w(p) grad p`; `r - mean of the others` times
`grad log pi` is an unbiased estimate of `grad p`, and w is taken at the mean of the other answers, so that the answer's
own reward has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.methods.riskpo.settings import RiskSettings


@dataclass(frozen=True)
class Rates:
    """What a weight may look at. Q questions of G answers."""

    others: Tensor  # [Q, G] mean reward of the question's other answers
    count: Tensor  # [Q, 1] how many others there are
    width: Tensor  # [Q, 1] distance of neighbouring values of `others`: (best - worst reward) / count
    questions: Tensor  # [K] mean rewards of the batch's questions
    low: Tensor  # quantile of the questions' mean rewards at alpha
    high: Tensor  # and at beta


def mvar_weight(rate: Tensor, q_alpha: Tensor, q_beta: Tensor, omega: float, width: Tensor | float = 0.0) -> Tensor:
    """1 + omega below `q_alpha`, 1 up to `q_beta`, 0 above; the steps are ramps of `width`."""
    return omega * _below(rate, q_alpha, width) + _below(rate, q_beta, width)


def cvar_weight(rate: Tensor, quantile: Tensor, level: float, width: Tensor | float = 0.0) -> Tensor:
    """1 / level below the quantile at `level`, 0 above; the step is a ramp of `width`."""
    return _below(rate, quantile, width) / level


def entropic_weight(rate: Tensor, temperature: float, reference: Tensor) -> Tensor:
    """`exp(-t p) / E exp(-t p)`, E over `reference`."""
    lowest = reference.min()
    normaliser = torch.exp(-temperature * (reference - lowest)).mean()
    return torch.exp(-temperature * (rate - lowest)) / normaliser


def pass_at_k_weight(right: Tensor, count: Tensor, k: int) -> Tensor:
    """Unbiased estimate of `k (1 - p)^(k - 1)`, from `right` of `count` other answers: the share of wrong (k - 1)-sets.

    0 where there are fewer than k - 1 others, of which no unbiased estimate exists.
    """
    weight = torch.full_like(right, float(k))
    for taken in range(k - 1):
        weight = weight * (count - right - taken).clamp(min=0) / (count - taken).clamp(min=1)
    return weight


def _mvar(rates: Rates, settings: RiskSettings) -> Tensor:
    return mvar_weight(rates.others, rates.low, rates.high, settings.omega, rates.width)


def _cvar(rates: Rates, settings: RiskSettings) -> Tensor:
    return cvar_weight(rates.others, rates.low, settings.alpha, rates.width)


def _entropic(rates: Rates, settings: RiskSettings) -> Tensor:
    return entropic_weight(rates.others, settings.temperature, rates.questions)


def _pass_at_k(rates: Rates, settings: RiskSettings) -> Tensor:
    return pass_at_k_weight((rates.others * rates.count).round(), rates.count, settings.k)


def _mean(rates: Rates, settings: RiskSettings) -> Tensor:
    return torch.ones_like(rates.others)


WEIGHTS: dict[str, Callable[[Rates, RiskSettings], Tensor]] = {
    "mvar": _mvar,
    "cvar": _cvar,
    "entropic": _entropic,
    "pass_at_k": _pass_at_k,
    "mean": _mean,
}
"""The measures of `RiskSettings.risk`."""


def _below(rate: Tensor, quantile: Tensor, width: Tensor | float) -> Tensor:
    """Share of `rate ± width / 2` that lies below `quantile`; half where width is 0 and both are equal."""
    width = torch.as_tensor(width, dtype=rate.dtype)
    ramp = ((quantile - rate) / torch.where(width > 0, width, 1.0) + 0.5).clamp(0, 1)
    step = ((quantile - rate).sign() + 1) / 2
    return torch.where(width > 0, ramp, step)
