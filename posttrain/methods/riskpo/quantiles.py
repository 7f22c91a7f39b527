"""Quantiles of scores, over earlier steps or of one batch.

A tracker is asked before it is told: a step's advantages rest on earlier steps' scores, the first step's on its own.
States are plain numbers and lists, so that they go into a checkpoint as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.methods.riskpo.settings import RiskSettings

LEVELS = tuple(round(0.05 * index, 2) for index in range(1, 20))

_MAX_ATOMS = 4096
_FORGOTTEN = 1e-6
_TOLERANCE = 1e-9


class Tracker(Protocol):
    """Where quantiles come from."""

    def quantiles(self, alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Quantiles at two levels, fp64, broadcastable to `scores` `[N, G]`, and whether they are of `scores` alone."""
        ...

    def update(self, scores: Tensor) -> None:
        """Take in the scores of a step, any shape."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` restores: numbers and lists of numbers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict` of the same kind of tracker."""
        ...


def inverse_cdf(atoms: Tensor, weights: Tensor, level: float) -> Tensor:
    """Smallest atom up to which there is a share `level` of the weight. Atoms ascend. Both `[K]`."""
    shares = weights.cumsum(0) / weights.sum()
    # The sum of the shares has rounding errors: 0.2 of five equal weights is the first of them.
    return atoms[min(int((shares < level - _TOLERANCE).sum()), len(atoms) - 1)]


def batch_quantiles(alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles of all scores together, each one of the scores."""
    atoms = scores.flatten().double().sort().values
    weights = torch.ones_like(atoms)
    return inverse_cdf(atoms, weights, alpha), inverse_cdf(atoms, weights, beta)


class BatchQuantiles:
    """Quantiles of the batch itself; without a state."""

    def quantiles(self, alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Those of all scores together."""
        return *batch_quantiles(alpha, beta, scores), True

    def update(self, scores: Tensor) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""


class BundleQuantiles(BatchQuantiles):
    """Quantiles of each bundle's copies, interpolated linearly as in the released code; without a state."""

    def quantiles(self, alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor, bool]:
        """`[N, 1]` each."""
        low, high = (scores.double().quantile(level, dim=1, keepdim=True) for level in (alpha, beta))
        return low, high, True


class EmaHistogram:
    """Quantiles of a histogram of scores whose older steps weigh less.

    The atoms are the scores themselves (rounded to 1e-9), so any lattice is exact without being declared. Atoms below a
    millionth of the weight are dropped; of more than 4,096 (continuous rewards) neighbours are merged into their mean.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.atoms = torch.empty(0, dtype=torch.float64)  # [K], ascending
        self.weights = torch.empty(0, dtype=torch.float64)  # [K]

    def quantiles(self, alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Of the histogram; of `scores` as long as it is empty."""
        if not len(self.atoms):
            return *batch_quantiles(alpha, beta, scores), True
        low, high = (inverse_cdf(self.atoms, self.weights, level) for level in (alpha, beta))
        return low, high, False

    def update(self, scores: Tensor) -> None:
        """Every step counts the same, whatever its number of scores."""
        if not scores.numel():
            return
        new, counts = _rounded(scores.flatten().double()).unique(return_counts=True)
        weights = torch.cat([self.decay * self.weights, (1 - self.decay) * counts / scores.numel()])
        self.atoms, places = torch.cat([self.atoms, new]).unique(return_inverse=True)
        self.weights = torch.zeros_like(self.atoms).index_add_(0, places, weights)
        kept = self.weights >= _FORGOTTEN * self.weights.sum()
        self.atoms, self.weights = self.atoms[kept], self.weights[kept]
        while len(self.atoms) > _MAX_ATOMS:
            self.atoms, self.weights = _merged(self.atoms, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Atoms and weights."""
        return {"atoms": self.atoms.tolist(), "weights": self.weights.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace atoms and weights."""
        self.atoms = torch.tensor(state["atoms"], dtype=torch.float64)
        self.weights = torch.tensor(state["weights"], dtype=torch.float64)


class SgdQuantiles:
    """Quantiles at the levels 0.05, 0.10 … 0.95 by stochastic approximation: `q += lr (u - share of R < q)`.

    The first update takes the quantiles of its scores; a step moves a quantile by less than `lr`, in units of the
    score. Levels are sorted after each, since they may cross. Asked for another level, the nearest answers.
    """

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr
        self.values = torch.empty(0, dtype=torch.float64)  # [19]

    def quantiles(self, alpha: float, beta: float, scores: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Of the levels nearest to those asked for; of `scores` before the first update."""
        if not len(self.values):
            return *batch_quantiles(alpha, beta, scores), True
        low, high = (self.values[_nearest(level)] for level in (alpha, beta))
        return low, high, False

    def update(self, scores: Tensor) -> None:
        """One step at all levels."""
        if not scores.numel():
            return
        flat, levels = scores.flatten().double(), torch.tensor(LEVELS, dtype=torch.float64)
        if not len(self.values):
            self.values = flat.quantile(levels)
            return
        below = (flat < self.values[:, None]).double().mean(1)
        self.values = (self.values + self.lr * (levels - below)).sort().values

    def state_dict(self) -> dict[str, Any]:
        """The values at all levels."""
        return {"values": self.values.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the values."""
        self.values = torch.tensor(state["values"], dtype=torch.float64)


def make_tracker(settings: RiskSettings) -> Tracker:
    """A tracker without history for `quantile_source`."""
    if settings.quantile_source == "ema_hist":
        return EmaHistogram(settings.hist_decay)
    if settings.quantile_source == "tracked":
        return SgdQuantiles(settings.quantile_lr)
    return BundleQuantiles() if settings.quantile_source == "bundle" else BatchQuantiles()


def _nearest(level: float) -> int:
    return min(range(len(LEVELS)), key=lambda index: math.fabs(LEVELS[index] - level))


def _rounded(scores: Tensor) -> Tensor:
    return scores.round(decimals=9)


def _merged(atoms: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each two neighbours as one atom at their mean; of an odd number the last stays."""
    groups = torch.arange(len(atoms)) // 2
    sums = torch.zeros(int(groups[-1]) + 1, dtype=atoms.dtype).index_add_(0, groups, weights)
    moments = torch.zeros_like(sums).index_add_(0, groups, weights * atoms)
    return moments / sums, sums
