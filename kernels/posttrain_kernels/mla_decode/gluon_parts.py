"""What both Gluon kernels of latent decoding share: a part's bounds, rows of matrices, the last tile, the result.

Gluon is Triton with the layouts written down. Both kernels give a group of four warps 64 heads, the rows of a Hopper
matrix instruction.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma

# Gluon is experimental: two names of Triton 3.6 are others in later versions.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def part(start, length, split, splits, SLOTS: gl.constexpr):
    """The slots [first, last) of one split, its tiles, and whether the row has a whole one."""
    slots = gl.maximum(length.to(gl.int32) - start, 0)
    tiles = (slots + SLOTS - 1) // SLOTS
    first = start + split * tiles // splits * SLOTS
    last = gl.minimum(start + (split + 1) * tiles // splits * SLOTS, start + slots)
    count = (gl.maximum(last - first, 0) + SLOTS - 1) // SLOTS
    return first, last, count, slots >= SLOTS


@gluon.jit
def rows(p_rows, first, stride, end, left, COUNT: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr):
    """[COUNT, BLOCK] of a matrix from row `first` and column `left`, zeros from row `end` and column WIDTH on."""
    LAYOUT: gl.constexpr = _layout(BLOCK)
    index = first + gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    column = left + gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    p_tile = p_rows + index[:, None].to(gl.int64) * stride + column[None, :]
    return gl.load(p_tile, mask=(index < end)[:, None] & (column < WIDTH)[None, :], other=0.0)


@gluon.jit
def hide(b_scores, begin, last, whole, SLOTS: gl.constexpr, SCORES: gl.constexpr):
    """-inf where the last tile has no new slot: it begins early enough to end in the range."""
    place = gl.where(whole, gl.minimum(begin, last - SLOTS), begin)
    slot = place + gl.arange(0, SLOTS, gl.SliceLayout(0, SCORES))
    return gl.where(((slot >= begin) & (slot < last))[None, :], b_scores, float("-inf"))


@gluon.jit
def scaled(b_out, b_factor, RESULT: gl.constexpr):
    """Every head's row times its factor."""
    return b_out * gl.convert_layout(b_factor, gl.SliceLayout(1, RESULT))[:, None]


@gluon.jit
def store_result(
    p_out,
    b_out,
    stage,
    heads,
    splits,
    left,
    R: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK: gl.constexpr,
    RESULT: gl.constexpr,
):
    """Columns from `left` on of the heads' results; by way of the shared `stage` whole rows go out in one piece."""
    b_out = b_out.to(p_out.dtype.element_ty)
    if p_out.dtype.element_ty == stage.dtype:
        LAYOUT: gl.constexpr = _layout(BLOCK)
        stage.store(b_out)
        barrier()
        _store_rows(p_out, stage.load(LAYOUT), heads, splits, left, R, HEADS, BLOCK, LAYOUT)
    else:
        _store_rows(p_out, b_out, heads, splits, left, R, HEADS, BLOCK, RESULT)


@gluon.jit
def _store_rows(
    p_out,
    b_out,
    heads,
    splits,
    left,
    R: gl.constexpr,
    HEADS: gl.constexpr,
    BLOCK: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    head = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    column = left + gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    p_target = p_out + (head * splits * R)[:, None] + column[None, :]
    gl.store(p_target, b_out, mask=(head < heads)[:, None] & (column < R)[None, :])


@gluon.constexpr_function
def _layout(block):
    """Of rows `block` wide in four warps, 16 bytes a thread."""
    lanes = min(block // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
