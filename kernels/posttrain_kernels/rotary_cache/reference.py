"""Rotary embedding and cache writes in plain torch: the contract, and what the CPU runs.

Legend: B rows, one token each; H query heads, G key/value heads of width d; S cache slots; P positions of the tables;
r latent width, d_r rotary width of latent attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm_reference


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x·cos + rotate_half(x)·sin for x [B, H, d] at `positions` [B], tables [P, d] cast to x's dtype (as transformers).

    Half-split layout: entry i turns with entry i + d/2.
    """
    cos, sin = (table.index_select(0, positions).to(x.dtype).unsqueeze(1) for table in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotated queries [B, H, d] of qkv [B, (H + 2G) d]; rotated keys and values go to `cache[:B, :, slot]`."""
    shared, width = k_cache.shape[1], k_cache.shape[3]
    heads = qkv.unflatten(-1, (-1, width))
    query, key, value = heads.split((heads.shape[1] - 2 * shared, shared, shared), dim=1)
    if q_norm is not None:
        query = rms_norm_reference(query, q_norm, eps)[0].to(qkv.dtype)
        key = rms_norm_reference(key, k_norm, eps)[0].to(qkv.dtype)
    _write(k_cache, slot, rotate_reference(key, cos, sin, positions))
    _write(v_cache, slot, value)
    return rotate_reference(query, cos, sin, positions)


def latent_cache_reference(
    kv_a: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Latent (normalised with a weight) and rotated key of kv_a [B, r + d_r] go to `cache[:B, 0, slot]`."""
    latent, k_rope = kv_a.unsqueeze(1).split((latent_cache.shape[-1], rope_cache.shape[-1]), dim=-1)
    if norm_weight is not None:
        latent = rms_norm_reference(latent, norm_weight, eps)[0]
    _write(latent_cache, slot, latent)
    _write(rope_cache, slot, rotate_reference(k_rope, cos, sin, positions))


def _write(cache: Tensor, slot: Tensor, heads: Tensor) -> None:
    """heads [B, G, d] into slot `slot` of the first B rows of cache [Bmax, G, S, d]."""
    cache[: heads.shape[0]].index_copy_(2, slot.reshape(1), heads.unsqueeze(2).to(cache.dtype))
