"""The low-rank query: its leading directions, as the latent has those of keys and values. Saves parameters, no cache.

q = W x + b; the bias stays whole. With R the leading eigenvectors of S E[W x (W x)ᵀ] Sᵀ, the projections are
Rᵀ S W (down) and S⁻¹ R (up). S is the identity for weights and activations: for weights these are X-EcoMLA's factors
(singular values on the down side), for activations TransMLA's query PCA. For `attention` an error in a query weighs as
much as the keys of its group make of it. Queries that a norm follows (Qwen3) count as that norm will scale them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.methods.mla_upcycling import latent
from posttrain.methods.mla_upcycling.source import SourceLayer, norm_scale


def low_rank_query(source: SourceLayer, heads: int, rank: int, key_moments: Tensor | None = None) -> latent.LowRank:
    """`encode` [r_q, H·d_h] from source queries without their bias, `decode` [H·d_h, r_q] back to them.

    Args:
        key_moments: E[k kᵀ] of every KV head [G, d_h, d_h] for the objective `attention`, else None.
    """
    weight = source.query[0]
    moment, _ = latent.output_moment(weight, weight.new_zeros(len(weight)), *source.input_moments())
    if key_moments is None and source.query_norm is None:
        return latent.low_rank(moment, rank)
    roots = [torch.eye(len(weight) // heads, dtype=weight.dtype, device=weight.device).expand(heads, -1, -1)] * 2
    if key_moments is not None:
        repeats = heads // len(key_moments)
        roots = [root.repeat_interleave(repeats, 0) for root in latent.symmetric_root(key_moments)]
    if source.query_norm is not None:
        scale = norm_scale(source.query_moment(heads), source.query_norm)
        # A head's dead dimensions must not make the inverse explode.
        scale = scale.sign() * scale.abs().clamp_min(1e-3 * scale.abs().mean())
        roots = [roots[0] * scale[:, None, :], roots[1] / scale[:, :, None]]
    return latent.low_rank(moment, rank, *(torch.block_diag(*root) for root in roots))


def query_error(source: SourceLayer, found: latent.LowRank) -> float:
    """Root of lost over total energy of the queries without their bias, unweighted."""
    weight = source.query[0]
    moment, _ = latent.output_moment(weight, weight.new_zeros(len(weight)), *source.input_moments())
    missing = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - found.decode @ found.encode
    total = moment.trace().item()
    lost = ((missing @ moment) * missing).sum().clamp_min(0).item()
    return (lost / total) ** 0.5 if total > 0 else 0.0
