"""Grids, strides, descriptors and buffers of the Triton kernels of latent decoding."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..dispatch import nvidia_generation, on_own_device
from ..inference import dense_width, unit_stride
from ..sizes import cdiv, next_power_of_2
from .kernels import combine_parts_kernel, mla_decode_kernel
from .tiles import Tile, choose_splits, choose_tile

COMBINED_ELEMENTS = 2048
"""Of the parts, that one warp of the combining kernel loads at once; more where the splits are many."""
COMBINED_COLUMNS = 32
"""Least columns of its programs: 64 bytes in 16 bits."""


@on_own_device
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
    tile = _possible(tile, latent, rope, scale)
    blocks = cdiv(heads, tile.heads)
    splits = splits or choose_splits(rows * blocks, latent.shape[1], tile)
    if splits == 1:
        target, exponents = out, None
    else:
        target = torch.empty(rows, heads, splits, rank, device=out.device, dtype=out.dtype)
        exponents = torch.empty(rows, heads, splits, device=out.device, dtype=torch.float32)
    q_latent, q_rope = unit_stride(q_latent), unit_stride(q_rope)
    arguments = (
        q_latent,
        q_rope,
        latent,
        rope,
        _descriptor(latent, tile, tile.gluon and tile.halves) if tile.tma else None,
        _descriptor(rope, tile, False) if tile.tma else None,
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
    sizes |= dict(HEADS=tile.heads, SLOTS=tile.slots, PARTS=splits > 1)
    grid, overlap = (rows * blocks, splits), _overlap(out.device)
    if tile.gluon:
        _launch_gluon(tile, grid, arguments, sizes | overlap)
    else:
        dense = latent.stride(1) == rank and rope.stride(1) == rope.shape[2]
        options = dict(SLOTS_FIRST=tile.slots_first, TMA=tile.tma, DENSE=dense, STAGES=tile.stages, PDL=bool(overlap))
        mla_decode_kernel[grid](*arguments, **sizes, **options, **overlap, num_warps=tile.warps)
    if splits > 1:
        _combine(target, exponents, out, overlap)
    return out


def _launch_gluon(tile: Tile, grid: tuple[int, int], arguments: tuple, options: dict[str, object]) -> None:
    if tile.halves:
        from .gluon_wide import mla_decode_wide_kernel

        mla_decode_wide_kernel[grid](*arguments, **options, num_warps=4)
    else:
        from .gluon_narrow import mla_decode_narrow_kernel

        # Two programs of 64 heads share a multiprocessor's registers.
        limit = dict(maxnreg=128) if tile.heads == 64 else {}
        mla_decode_narrow_kernel[grid](*arguments, **options, **limit, STAGES=tile.stages, num_warps=4)


def _combine(parts: Tensor, exponents: Tensor, out: Tensor, overlap: dict[str, bool]) -> None:
    """Means [B, H, SPLITS, r] and exponents [B, H, SPLITS] of the parts into `out` [B, H, r]."""
    rows, heads, splits, rank = parts.shape
    padded = next_power_of_2(splits)
    columns = min(_padded(rank), max(COMBINED_COLUMNS, COMBINED_ELEMENTS // padded))
    places = max(1, COMBINED_ELEMENTS // (padded * columns))
    grid = (cdiv(rows * heads, places), cdiv(rank, columns))
    options = dict(R=rank, PLACES=places, SPLITS=padded, COLUMNS=columns, PDL=bool(overlap), **overlap)
    warps = min(16, max(1, padded * columns // (2 * COMBINED_ELEMENTS)))
    combine_parts_kernel[grid](parts, exponents, out, rows * heads, splits, **options, num_warps=warps)


def _overlap(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch: a kernel is set up while the one before it ends, and waits for it in place."""
    return dict(launch_pdl=True) if nvidia_generation(device) >= 9 else {}


def _padded(width: int) -> int:
    """Widths are padded to a power of two, 16 at least (the depth of a tensor core's product)."""
    return max(16, next_power_of_2(width))


def _possible(tile: Tile, latent: Tensor, rope: Tensor, scale: float) -> Tile:
    """The tile, without what these caches or this device do not allow."""
    if tile.tma and not (_describable(latent) and _describable(rope)):
        tile = tile.plain()
        tile = replace(tile, tma=False, stages=max(2, tile.stages))
    # The softmax of the Gluon kernels takes the maximum before it scales.
    if tile.gluon and not (_runs_gluon(latent.device, latent.dtype) and scale > 0):
        tile = tile.plain()
    return tile.fitted(*(cache.element_size() * _padded(cache.shape[2]) for cache in (latent, rope)))


def _describable(cache: Tensor) -> bool:
    """Whether the bulk copy engine can address a cache [Bmax, S, d] as one matrix of Bmax · S rows."""
    even = cache.shape[0] == 1 or cache.stride(0) == cache.shape[1] * cache.stride(1)
    aligned = cache.data_ptr() % 16 == 0 and cache.stride(1) * cache.element_size() % 16 == 0
    return even and aligned and cache.shape[0] * cache.shape[1] < 2**31


def _runs_gluon(device: torch.device, dtype: torch.dtype) -> bool:
    """Hopper's matrix instructions, on 16-bit elements."""
    return nvidia_generation(device) == 9 and dtype.itemsize == 2


def _descriptor(cache: Tensor, tile: Tile, halves: bool) -> object:
    """The copy engine's view of a cache, in tiles of slots and padded width or half of it; Gluon's has a layout too."""
    rows, capacity, width = cache.shape
    box = [tile.slots, _padded(width) // 2 if halves else _padded(width)]
    view = ([rows * capacity, width], [cache.stride(1), 1], box)
    if not tile.gluon:
        return TensorDescriptor(cache, *view)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[cache.dtype]
    return hopper.TensorDescriptor(cache, *view, gl.NVMMASharedLayout.get_default_for(view[2], element))
