"""Grids, strides and buffers of the Triton kernels of decode attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import on_own_device
from ..inference import dense_width, unit_stride
from ..sizes import cdiv, next_power_of_2
from .kernels import combine_kernel, decode_attention_kernel
from .tiles import Tile, choose_splits, choose_tile


@on_own_device
def decode_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    q_rope: Tensor | None,
    rope_cache: Tensor | None,
    *,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The Triton code behind `decode_attention`; same contract, checks done, caches [Bmax, G, S, ·]."""
    rows, heads, width = q.shape
    shared, capacity, value_width = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
    group = heads // shared
    tile = tile or choose_tile(group, width, value_width)
    blocks = cdiv(group, tile.heads)
    splits = splits or choose_splits(rows * shared * blocks, capacity)
    out = torch.empty(rows, heads, value_width, device=q.device, dtype=q.dtype)
    if not out.numel():
        return out
    if splits == 1:
        target, exponents = out, None
    else:
        target = torch.empty(rows, heads, splits, value_width, device=q.device, dtype=torch.float32)
        exponents = torch.empty(rows, heads, splits, device=q.device, dtype=torch.float32)
    q, q_rope = unit_stride(q), None if q_rope is None else unit_stride(q_rope)
    decode_attention_kernel[(rows * shared * blocks, splits)](
        q,
        k_cache,
        v_cache,
        q_rope,
        rope_cache,
        start.contiguous(),
        length,
        target,
        exponents,
        *q.stride()[:2],
        *dense_width(k_cache).stride()[:3],
        *dense_width(v_cache).stride()[:3],
        *((0, 0) if q_rope is None else q_rope.stride()[:2]),
        *((0, 0, 0) if rope_cache is None else dense_width(rope_cache).stride()[:3]),
        shared,
        scale * math.log2(math.e),
        GROUP=group,
        D_K=width,
        D_V=value_width,
        D_R=0 if rope_cache is None else rope_cache.shape[3],
        BLOCK_K=_padded(width),
        BLOCK_V=_padded(value_width),
        BLOCK_R=16 if rope_cache is None else _padded(rope_cache.shape[3]),
        HEADS=tile.heads,
        SLOTS=tile.slots,
        SPLITS=splits,
        DOT=tile.dot,
        ONE_CACHE=_same_memory(k_cache, v_cache),
        STAGES=tile.stages,
        num_warps=tile.warps,
    )
    if splits > 1:
        combine_kernel[(rows * heads,)](
            target, exponents, out, SPLITS=splits, D_V=value_width, BLOCK_V=_padded(value_width), num_warps=2
        )
    return out


def _padded(width: int) -> int:
    """Widths are padded to a power of two, 16 at least (the depth of a tensor core's product)."""
    return max(16, next_power_of_2(width))


def _same_memory(keys: Tensor, values: Tensor) -> bool:
    """Whether keys and values are one latent cache, which is then read once."""
    return keys.data_ptr() == values.data_ptr() and keys.shape == values.shape and keys.stride() == values.stride()
