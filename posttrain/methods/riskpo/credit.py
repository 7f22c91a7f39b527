"""From the score phi of a bundle to what each of its answers gets.

Everywhere N bundles of B questions with G copies; rewards `[N, B, G]` have NaN where an answer could not be scored, and
such an answer gets 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]

_MAX_LEVELS = 64
_DRAWS = 256
_TOLERANCE = 1e-6


def shared(phi: Tensor, rewards: Tensor) -> Tensor:
    """The bundle's phi `[N, G]` for each of its answers: the paper's rule."""
    return _scored(phi[:, None].expand_as(rewards), rewards)


def sum_mean(phi: Tensor, rewards: Tensor) -> Tensor:
    """phi times the answer's part in the sum of the copy's centred rewards; equal parts where that sum is about 0."""
    centred = (rewards - rewards.nanmean(2, keepdim=True)).nan_to_num(0.0)
    total = centred.sum(1, keepdim=True)
    usable = total.abs() > 1e-6
    part = torch.where(usable, centred / torch.where(usable, total, 1.0), 1 / rewards.shape[1])
    return _scored(phi[:, None] * part, rewards)


def std(phi: Tensor, rewards: Tensor) -> Tensor:
    """phi over the standard deviation of the question's rewards; over 1 where that is at most 1e-3."""
    deviation = nanstd(rewards)
    return _scored(phi[:, None] / (torch.where(deviation > 1e-3, deviation, 1.0) + 1e-6), rewards)


def score(phi: Tensor, rewards: Tensor) -> Tensor:
    """Half of phi for an answer with a positive reward, 1.5 of it for another."""
    return _scored(phi[:, None] * torch.where(rewards > 0, 0.5, 1.5), rewards)


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shared": shared,
    "uniform": shared,
    "sum_mean": sum_mean,
    "std": std,
    "score": score,
}
"""Rules that look at the copies; `rb` does not."""


def rb(phi: Score, rewards: Tensor, draws: torch.Generator) -> Tensor:
    """`E phi(r + S) - its mean over the question's other answers`, S being the other questions' sum: `[N, B, G]`.

    Has the mean of `shared` and less variance: with rewards 0 and 1 it is `w_i (r - mean of the others)`, where w_i is
    the mean of `phi(S + 1) - phi(S)` and S is Poisson-binomial. The other questions' answers stand for their
    distributions. On a lattice of at most 64 steps they are convolved, which is exact; other rewards take 256 `draws`
    of S, the same for all answers of a question. A question without any reward is one drawn from the whole batch. A
    question with less than two rewards gets 0.
    """
    lattice = lattice_of(rewards)
    expected = _convolved(phi, rewards, *lattice) if lattice else _sampled(phi, rewards, draws)
    return leave_one_out(torch.where(rewards.isnan(), torch.nan, expected))


def leave_one_out(values: Tensor) -> Tensor:
    """Each value less the mean of the others of its last axis, NaN left out; 0 for NaN and for the only one."""
    count = (~values.isnan()).sum(-1, keepdim=True)
    # Relative to one of them, equal values are 0 and stay so, without rounding errors.
    values = values - values.nan_to_num(torch.inf).amin(-1, keepdim=True)
    centred = values - values.nanmean(-1, keepdim=True)
    return torch.where(count > 1, centred * count / (count - 1).clamp(min=1), 0.0).nan_to_num(0.0)


def nanstd(values: Tensor) -> Tensor:
    """Unbiased standard deviation over the last axis, which stays with length 1; 0 where there are less than two."""
    count = (~values.isnan()).sum(-1, keepdim=True)
    squares = (values - values.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def lattice_of(rewards: Tensor) -> tuple[float, float, int] | None:
    """Lowest reward, spacing and number of levels of the coarsest lattice that holds all; None for more than 65."""
    values = rewards[~rewards.isnan()].round(decimals=9).unique()
    low, spacing = float(values[0]), 0.0
    for value in values[1:].tolist():
        spacing = _common_divisor(value - low, spacing)
        if (float(values[-1]) - low) > _MAX_LEVELS * spacing + _TOLERANCE:
            return None
    return (low, spacing, round((float(values[-1]) - low) / spacing) + 1) if spacing else (low, 1.0, 1)


def _common_divisor(one: float, other: float) -> float:
    while other > _TOLERANCE:
        rest = math.remainder(one, other)
        one, other = other, abs(rest)
    return one


def _convolved(phi: Score, rewards: Tensor, low: float, spacing: float, levels: int) -> Tensor:
    """`[N, B, G]`: expectation of phi over the exact distribution of the other questions' sum."""
    size = rewards.shape[1]
    index = ((rewards.nan_to_num(low) - low) / spacing).round().long()
    found = torch.nn.functional.one_hot(index, levels).double() * (~rewards.isnan())[..., None]
    counts = found.sum(2)  # [N, B, L]
    counts = torch.where(counts.sum(2, keepdim=True) > 0, counts, counts.sum((0, 1)))
    others = sums_of_others(counts / counts.sum(2, keepdim=True))  # [N, B, S]
    sums = size * low + spacing * torch.arange(size * (levels - 1) + 1, dtype=torch.float64)
    windows = phi(sums[None]).unfold(1, others.shape[2], 1)  # [N or 1, L, S]
    return (others @ windows.transpose(1, 2)).gather(2, index)


def sums_of_others(pmf: Tensor) -> Tensor:
    """`[N, B, L]` distributions over levels to `[N, B, (B - 1)(L - 1) + 1]`: of the sum over the other questions."""
    bundles, size, levels = pmf.shape
    sums = torch.zeros(bundles, size, (size - 1) * (levels - 1) + 1, dtype=pmf.dtype)
    sums[..., 0] = 1
    for other in range(size):
        kernel = pmf[:, other, None].repeat(1, size, 1)
        kernel[:, other] = torch.nn.functional.one_hot(torch.tensor(0), levels)
        # Nothing wraps round: the axis has room for all the others.
        sums = sum(kernel[..., level, None] * sums.roll(level, 2) for level in range(levels))
    return sums


def _sampled(phi: Score, rewards: Tensor, draws: torch.Generator) -> Tensor:
    """`[N, B, G]`: mean of phi over draws of the other questions' answers."""
    bundles, size, generations = rewards.shape
    flat = rewards.flatten(0, 1)
    known = ~flat.isnan()
    pool = flat[known]
    index = torch.multinomial(
        torch.where(known.any(1, keepdim=True), known, True).double(), _DRAWS, True, generator=draws
    )
    pooled = pool[torch.randint(len(pool), index.shape, generator=draws)]
    drawn = torch.where(known.any(1, keepdim=True), flat.gather(1, index), pooled).view(bundles, size, _DRAWS)
    others = drawn.sum(1, keepdim=True) - drawn
    sums = others[:, :, None] + rewards.nan_to_num(0.0)[..., None]  # [N, B, G, K]
    return phi(sums.flatten(1)).view(sums.shape).mean(3)


def _scored(advantages: Tensor, rewards: Tensor) -> Tensor:
    return torch.where(rewards.isnan(), 0.0, advantages)
