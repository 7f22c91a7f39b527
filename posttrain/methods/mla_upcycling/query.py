"""The low-rank query: its leading directions, as the latent has those of keys and values. Saves parameters, no cache.

q = W x + b; the bias stays whole. With R the leading eigenvectors of S E[W x (W x)ᵀ] Sᵀ, the projections are
Rᵀ S W (down) and S⁻¹ R (up). S is the identity for weights and activations: for weights these are X-EcoMLA's factors
(singular values on the down side), for activations TransMLA's query PCA. For `attention` an error in a query weighs as
much as the keys of its group (before rotation) make of it. Queries that a norm follows (Qwen3) count as that norm will
scale them on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.methods.mla_upcycling import latent
from posttrain.methods.mla_upcycling.shape import MlaShape
from posttrain.methods.mla_upcycling.source import SourceLayer, norm_scale


@dataclass(frozen=True)
class LowRankQuery:
    """`found.encode` [r_q, H·d_h] from source queries without their bias, `found.decode` [H·d_h, r_q] back to them.

    `error` is the root of lost over total energy of those queries, unweighted.
    """

    found: latent.LowRank
    error: float


def low_rank_query(source: SourceLayer, shape: MlaShape, objective: str) -> LowRankQuery:
    """The low-rank query of one layer, of rank `shape.q_lora_rank`, under the objective."""
    weight = source.query[0]
    moment, _ = latent.output_moment(weight, weight.new_zeros(len(weight)), *source.input_moments())
    found = latent.low_rank(moment, shape.q_lora_rank, *_metric(source, shape, objective))
    missing = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - found.decode @ found.encode
    total = moment.trace().item()
    lost = ((missing @ moment) * missing).sum().clamp_min(0).item()
    return LowRankQuery(found, (lost / total) ** 0.5 if total > 0 else 0.0)


def _metric(source: SourceLayer, shape: MlaShape, objective: str) -> tuple[Tensor, Tensor] | tuple[()]:
    """S and S⁻¹ [H·d_h, H·d_h]; nothing for the identity."""
    if objective != "attention" and source.query_norm is None:
        return ()
    eye = torch.eye(shape.head_dim, dtype=source.output.dtype, device=source.output.device)
    roots = [eye.expand(shape.heads, -1, -1)] * 2
    if objective == "attention":
        keys = latent.symmetric_root(_key_moments(source, shape))
        roots = [root.repeat_interleave(shape.heads // shape.kv_heads, 0) for root in keys]
    if source.query_norm is not None:
        scale = norm_scale(source.query_moment(shape.heads), source.query_norm)
        # A dead dimension of a head must not make the inverse explode.
        scale = scale.abs().clamp_min(1e-3 * scale.abs().mean())
        roots = [roots[0] * scale[:, None, :], roots[1] / scale[:, :, None]]
    return torch.block_diag(*roots[0]), torch.block_diag(*roots[1])


def _key_moments(source: SourceLayer, shape: MlaShape) -> Tensor:
    """E[k kᵀ] of every KV head, [G, d_h, d_h]."""
    width = shape.kv_heads * shape.head_dim
    split = (
        source.key_value_moments()[0][:width, :width]
        .unflatten(0, (shape.kv_heads, -1))
        .unflatten(2, (shape.kv_heads, -1))
    )
    return split.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
