"""Grids, strides, descriptors and buffers of the Triton kernels of latent decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..inference import dense_width, unit_stride
from .kernels import combine_parts_kernel, mla_decode_kernel
from .tiles import Tile, choose_splits, choose_tile

COMBINED_COLUMNS = 64
COMBINED_PARTS = 32
"""Columns of a program of the combining kernel, and parts it loads at a time."""


def mla_decode_triton(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    *,
    splits: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The Triton code behind `mla_decode`; same contract, checks done.

    Raises:
        ValueError: latents wider than the kernels go, or a cache whose last dimension has gaps.
    """
    rows, heads, rank = q_latent.shape
    out = torch.empty(rows, heads, rank, device=q_latent.device, dtype=q_latent.dtype)
    if not out.numel():
        return out
    tile = tile or choose_tile(heads, rank, latent_cache.element_size())
    latent, rope = dense_width(latent_cache), dense_width(rope_cache)
    tile = _possible(tile, latent, rope)
    blocks = triton.cdiv(heads, tile.heads)
    splits = splits or choose_splits(rows * blocks, latent.shape[1], tile)
    if splits == 1:
        target, exponents = out, None
    else:
        target = torch.empty(rows, heads, splits, rank, device=out.device, dtype=torch.float32)
        exponents = torch.empty(rows, heads, splits, device=out.device, dtype=torch.float32)
    q_latent, q_rope = unit_stride(q_latent), unit_stride(q_rope)
    arguments = (
        q_latent,
        q_rope,
        latent,
        rope,
        *(_descriptor(cache, tile) if tile.tma else None for cache in (latent, rope)),
        start.contiguous(),
        length,
        target,
        exponents,
        *q_latent.stride()[:2],
        *q_rope.stride()[:2],
        *latent.stride()[:2],
        *rope.stride()[:2],
        latent.shape[1],
        splits,
        scale * math.log2(math.e),
    )
    sizes = dict(H=heads, R=rank, D_R=rope.shape[2], BLOCK_R=_padded(rank), BLOCK_D=_padded(rope.shape[2]))
    sizes |= dict(HEADS=tile.heads, SLOTS=tile.slots, PARTS=splits > 1, num_warps=tile.warps)
    grid = (rows * blocks, splits)
    if tile.gluon:
        from .gluon_kernels import mla_decode_gluon_kernel

        mla_decode_gluon_kernel[grid](*arguments, **sizes)
    else:
        dense = latent.stride(1) == rank and rope.stride(1) == rope.shape[2]
        options = dict(SLOTS_FIRST=tile.slots_first, TMA=tile.tma, DENSE=dense, STAGES=tile.stages)
        mla_decode_kernel[grid](*arguments, **sizes, **options)
    if splits > 1:
        _combine(target, exponents, out)
    return out


def _combine(parts: Tensor, exponents: Tensor, out: Tensor) -> None:
    """Means [B, H, SPLITS, r] and exponents [B, H, SPLITS] of the parts into `out` [B, H, r]."""
    rows, heads, splits, rank = parts.shape
    columns = min(COMBINED_COLUMNS, _padded(rank))
    grid = (rows * heads, triton.cdiv(rank, columns))
    combine_parts_kernel[grid](
        parts, exponents, out, splits, R=rank, COLUMNS=columns, CHUNK=COMBINED_PARTS, num_warps=4
    )


def _padded(width: int) -> int:
    """Widths are padded to a power of two, 16 at least (the depth of a tensor core's product)."""
    return max(16, triton.next_power_of_2(width))


def _possible(tile: Tile, latent: Tensor, rope: Tensor) -> Tile:
    """The tile, without what these caches or this device do not allow."""
    if tile.tma and not (_describable(latent) and _describable(rope)):
        tile = replace(tile, tma=False, gluon=False, stages=max(2, tile.stages))
    return replace(tile, gluon=tile.gluon and _runs_gluon(latent.device, latent.dtype))


def _describable(cache: Tensor) -> bool:
    """Whether the bulk copy engine can address a cache [Bmax, S, d] as one matrix of Bmax · S rows."""
    even = cache.shape[0] == 1 or cache.stride(0) == cache.shape[1] * cache.stride(1)
    aligned = cache.data_ptr() % 16 == 0 and cache.stride(1) * cache.element_size() % 16 == 0
    return even and aligned and cache.shape[0] * cache.shape[1] < 2**31


def _runs_gluon(device: torch.device, dtype: torch.dtype) -> bool:
    """Hopper's matrix instructions, on 16-bit elements."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and dtype.itemsize == 2


def _descriptor(cache: Tensor, tile: Tile) -> object:
    """The copy engine's view of a cache, in tiles of slots and padded width; Gluon's has a layout too."""
    rows, capacity, width = cache.shape
    view = ([rows * capacity, width], [cache.stride(1), 1], [tile.slots, _padded(width)])
    if not tile.gluon:
        return TensorDescriptor(cache, *view)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[cache.dtype]
    return hopper.TensorDescriptor(cache, *view, gl.NVMMASharedLayout.get_default_for(view[2], element))
