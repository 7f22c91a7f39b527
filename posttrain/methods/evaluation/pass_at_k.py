"""The mathematics of pass@k: how likely at least one of k sampled answers is right, from n that were scored.

Of n answers to a problem c are right. A choice of k of them without replacement has no right one with probability
C(n-c, k) / C(n, k), so that

    pass@k = 1 - C(n-c, k) / C(n, k) = 1 - prod_{i = n-c+1 .. n} (1 - k/i)

is unbiased for the chance that k fresh samples hold a right one (Chen et al., arXiv:2107.03374); 1 - (1 - c/n)^k is
not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from posttrain.methods.evaluation.intervals import Json, mean_intervals, verdict


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The estimate of one problem. Raises ValueError unless 0 <= correct <= n and 1 <= k <= n."""
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {correct} right answers among {n}")
    if n - correct < k:
        return 1.0
    # By logarithms: with few right answers among many the difference to 1 would lose its digits.
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - correct + 1, n + 1)))


def pass_figures(
    correct: Mapping[str, Sequence[int]], n: int, ks: Sequence[int], bootstrap_samples: int, seed: int
) -> dict[str, Json]:
    """Mean pass@k of each model over the same problems, and the paired difference of the first two.

    `*_low` and `*_high` bound 95 % percentile intervals, problems drawn with replacement (the same ones for all
    models); they are absent for a single problem. `difference` is first minus second, absent for one model; its
    `*_verdict` is "better", "worse", or that no difference was detected, which is not that there is none.

    Args:
        correct: model to right answers of n, a problem each.
    """
    found: dict[str, Json] = {}
    estimates = {
        name: {k: [pass_at_k(n, count, k) for count in counts] for k in ks} for name, counts in correct.items()
    }
    interval = mean_intervals(bootstrap_samples, seed)
    for name, by_k in estimates.items():
        found[name] = {key: value for k in ks for key, value in interval(f"pass@{k}", by_k[k]).items()}
    if len(estimates) < 2:
        return found
    first, second = list(estimates.values())[:2]
    difference: Json = {}
    for k in ks:
        values = [one - other for one, other in zip(first[k], second[k], strict=True)]
        bounded = interval(f"pass@{k}", values)
        difference |= {**bounded, f"pass@{k}_verdict": verdict(bounded, f"pass@{k}")}
    return {**found, "difference": difference}
