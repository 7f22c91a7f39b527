"""95 % intervals of means and shares, and what an interval says of a difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from posttrain.methods.evaluation.metrics import bootstrap_interval

Json = dict[str, Any]

NO_DIFFERENCE = "no difference detected"
TOO_FEW = "too few problems for an interval"

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""


def mean_intervals(samples: int, seed: int) -> Callable[[str, Sequence[float]], Json]:
    """A function from a name and values to their mean, `name`, and its bootstrap bounds, `name_low` and `name_high`.

    Values of one length are drawn alike, whatever they are of. One value has no bounds.
    """

    def interval(name: str, values: Sequence[float]) -> Json:
        mean = math.fsum(values) / len(values)
        bounds = bootstrap_interval(values, [1] * len(values), samples, seed)
        return {name: mean} | ({} if bounds is None else {f"{name}_low": bounds[0], f"{name}_high": bounds[1]})

    return interval


def share_interval(name: str, right: Sequence[bool]) -> Json:
    """The share of right ones and its Wilson interval (1927), which has a width where all or none are right.

    With p = share and n = count: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    count, share = len(right), sum(right) / len(right)
    middle = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    scale = 1 + Z**2 / count
    # Rounding may put a bound beyond the share where that is 0 or 1.
    low, high = min(share, max(0.0, (middle - half) / scale)), max(share, min(1.0, (middle + half) / scale))
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def verdict(difference: Json, name: str) -> str:
    """ "better" or "worse" where the interval excludes 0, or why neither can be said."""
    low, high = difference.get(f"{name}_low"), difference.get(f"{name}_high")
    if low is None or high is None:
        return TOO_FEW
    if low <= 0 <= high:
        return NO_DIFFERENCE
    return "better" if low > 0 else "worse"
