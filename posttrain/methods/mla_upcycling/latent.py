"""The low-rank latent of position-free keys and values: balanced, in the norm of the calibration text (TransMLA's BKV).

With z = S n (n: position-free keys and values, S: a weighting) and M = E[z zᵀ], the best rank-r approximation of z in
the mean square is R Rᵀ z, R the r leading eigenvectors of M: the latent is c = Rᵀ S n, its expansion n̂ = S⁻¹ R c.
All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def output_moment(weight: Tensor, bias: Tensor, second: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor]:
    """Uncentred second moment and mean of y = W x + b, from those of x.

    Args:
        weight: [O, D]; bias: [O].
        second: E[x xᵀ] [D, D], or None for white inputs (then the moment is W Wᵀ + b bᵀ: weights alone).
        mean: E[x] [D], None with `second`.

    Returns:
        E[y yᵀ] [O, O] and E[y] [O].
    """
    if second is None or mean is None:
        return weight @ weight.T + torch.outer(bias, bias), bias.clone()
    linear = weight @ mean
    cross = torch.outer(linear, bias)
    return weight @ second @ weight.T + cross + cross.T + torch.outer(bias, bias), linear + bias


def balance(moment: Tensor, keys: int) -> float:
    """α of section 3.4 of the method card: mean root-mean-square of the key dimensions over that of the values.

    Args:
        moment: of [keys ; values]; `keys`: how many of its rows are keys.

    Returns:
        α, by which keys are divided before the decomposition; 1 where one side is empty or zero.
    """
    norms = moment.diagonal().clamp_min(0).sqrt()
    if keys in (0, norms.numel()):
        return 1.0
    key, value = norms[:keys].mean().item(), norms[keys:].mean().item()
    return key / value if key > 0 and value > 0 else 1.0


def symmetric_root(matrix: Tensor, damping: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix and its inverse; `damping` times the mean diagonal keeps the inverse bounded.

    Args:
        matrix: [..., N, N] symmetric.
    """
    ridge = damping * matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = ridge.clamp_min(torch.finfo(matrix.dtype).tiny)
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    values, vectors = torch.linalg.eigh(matrix + ridge * eye)
    root = values.clamp_min(0).sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


@dataclass(frozen=True)
class LowRank:
    """A latent: `encode` [r, N] makes it from position-free keys and values, `decode` [N, r] expands it.

    `energy` is the share of the weighted second moment that the latent keeps.
    """

    encode: Tensor
    decode: Tensor
    energy: float


def spectrum(moment: Tensor, weighting: Tensor) -> Tensor:
    """Eigenvalues of the weighted second moment, largest first: the energies that `low_rank` keeps in this order."""
    weighted = weighting @ moment @ weighting.T
    return torch.linalg.eigvalsh((weighted + weighted.T) / 2).flip(0).clamp_min(0)


def low_rank(moment: Tensor, rank: int, weighting: Tensor | None = None, unweighting: Tensor | None = None) -> LowRank:
    """The best rank-`rank` latent for a second moment under a weighting.

    Args:
        moment: E[n nᵀ] [N, N]; weighting: S [N, N], identity if None; unweighting: its inverse.
    """
    if weighting is None or unweighting is None:
        weighting = unweighting = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
    weighted = weighting @ moment @ weighting.T
    values, vectors = torch.linalg.eigh((weighted + weighted.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    basis = vectors[:, :rank]
    total = values.sum()
    energy = (values[:rank].sum() / total).item() if total > 0 else 1.0
    return LowRank(encode=basis.T @ weighting, decode=unweighting @ basis, energy=energy)
