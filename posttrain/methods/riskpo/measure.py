"""Risk measures of scores, lower scores being worse, and the score functions that their gradients are made of.

With q_u the u-quantile of the score R: grad MVaR = E[phi(R) grad log pi], phi being `mvar_score`, also for discrete R.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.methods.riskpo.settings import RiskSettings


def mvar_score(scores: Tensor, q_alpha: Tensor | float, q_beta: Tensor | float, omega: float) -> Tensor:
    """Weight of each score in the gradient of MVaR: `-(1 + w) max(q_a - R, 0) + clip(R, q_a, q_b) - q_b`, elementwise.

    Never positive; slope 1 + w below `q_alpha`, 1 up to `q_beta`, 0 above. The quantiles broadcast.
    """
    low, high = _like(scores, q_alpha), _like(scores, q_beta)
    return -(1 + omega) * (low - scores).clamp(min=0) + scores.clamp(low, high) - high


def cvar_score(scores: Tensor, quantile: Tensor | float, level: float) -> Tensor:
    """Weight of each score in the gradient of CVaR at `level`: `-max(q - R, 0) / level`, elementwise."""
    return -(_like(scores, quantile) - scores).clamp(min=0) / level


def entropic_score(scores: Tensor, temperature: float, reference: Tensor) -> Tensor:
    """Weight of each score in the gradient of entropic risk: `(1 - exp(-t R) / E exp(-t R)) / t`, E of `reference`."""
    # Both exponents are relative to the same score: large t and scores would overflow.
    lowest = reference.min()
    normaliser = torch.exp(-temperature * (reference - lowest)).mean()
    return (1 - torch.exp(-temperature * (scores - lowest)) / normaliser) / temperature


def score_function(settings: RiskSettings, low: Tensor, high: Tensor, reference: Tensor) -> Callable[[Tensor], Tensor]:
    """phi of the measure in `settings`, elementwise on sums of rewards.

    Args:
        low, high: quantiles at alpha and beta that broadcast to what phi is asked for.
        reference: scores whose mean stands for the expectation in the entropic risk.
    """
    if settings.risk == "cvar":
        return lambda scores: cvar_score(scores, low, settings.alpha)
    if settings.risk == "entropic":
        return lambda scores: entropic_score(scores, settings.temperature, reference)
    if settings.risk == "mean":
        return lambda scores: scores
    raised = high - low if settings.baseline == "none" else 0.0
    return lambda scores: mvar_score(scores, low, high, settings.omega) + raised


def mvar(atoms: Tensor, probabilities: Tensor, alpha: float, beta: float, omega: float) -> Tensor:
    """MVaR of a discrete distribution: `(1 + w) int_0^a F^-1 + int_a^b F^-1`; differentiable. Both `[K]`."""
    return omega * _lower_sum(atoms, probabilities, alpha) + _lower_sum(atoms, probabilities, beta)


def cvar(atoms: Tensor, probabilities: Tensor, level: float) -> Tensor:
    """Mean of the lowest share `level` of a discrete distribution; differentiable. Both `[K]`."""
    return _lower_sum(atoms, probabilities, level) / level


def rvar(atoms: Tensor, probabilities: Tensor, alpha: float, beta: float) -> Tensor:
    """Mean of what lies between the quantiles at `alpha` and `beta`; differentiable. Both `[K]`."""
    between = _lower_sum(atoms, probabilities, beta) - _lower_sum(atoms, probabilities, alpha)
    return between / (beta - alpha)


def entropic(atoms: Tensor, probabilities: Tensor, temperature: float) -> Tensor:
    """`-log E exp(-t R) / t` of a discrete distribution; differentiable. Both `[K]`."""
    return -torch.logsumexp(probabilities.log() - temperature * atoms, 0) / temperature


def omega_of_mixture(mixture: float, alpha: float, beta: float) -> float:
    """The paper's omega for the released code's `w_mix`: `1 + omega = w_mix (beta - alpha) / alpha`.

    The released code mixes normalised measures, `(w_mix CVaR_alpha + RVaR_alpha:beta) / (w_mix + 1)`.
    """
    return mixture * (beta - alpha) / alpha - 1


def mixture_of_omega(omega: float, alpha: float, beta: float) -> float:
    """The released code's `w_mix` for the paper's omega; inverse of `omega_of_mixture`."""
    return (1 + omega) * alpha / (beta - alpha)


def _like(scores: Tensor, value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=scores.dtype, device=scores.device)


def _lower_sum(atoms: Tensor, probabilities: Tensor, level: float) -> Tensor:
    """Integral of the quantile function from 0 to `level`."""
    atoms, order = atoms.sort()
    masses = probabilities[order]
    before = masses.cumsum(0) - masses
    return (atoms * torch.minimum(masses, (level - before).clamp(min=0))).sum()
