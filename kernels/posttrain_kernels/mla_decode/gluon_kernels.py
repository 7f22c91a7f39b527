"""Latent attention of one token a row for 64 heads a program, in Gluon: Triton with the layouts written down.

The same computation as `kernels.mla_decode_kernel` with heads first. There the compiler gives the whole product of the
scores to both groups of four warps; here each computes half of its columns, and half of the latent columns of the
result. Tiles come through the bulk copy engine into two buffers; the product with the latents of one tile runs while
the scores of the next are computed.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# Gluon is experimental: two names of Triton 3.6 are others in later versions.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit(do_not_specialize=["splits", "capacity"])
def mla_decode_gluon_kernel(
    p_q,
    p_q_rope,
    p_latent,
    p_rope,
    t_latent,
    t_rope,
    p_start,
    p_length,
    p_out,
    p_exponent,
    q_row,
    q_head,
    q_rope_row,
    q_rope_head,
    latent_row,
    latent_slot,
    rope_row,
    rope_slot,
    capacity,
    splits,
    scale_log2,
    H: gl.constexpr,
    R: gl.constexpr,
    D_R: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEADS: gl.constexpr,
    SLOTS: gl.constexpr,
    PARTS: gl.constexpr,
):
    DTYPE: gl.constexpr = t_latent.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SLOTS // 2, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_R // 2, 16])
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    BLOCKS: gl.constexpr = (H + HEADS - 1) // HEADS
    program, split = gl.program_id(0), gl.program_id(1)
    row = (program // BLOCKS).to(gl.int64)
    start = gl.load(p_start + row).to(gl.int32)
    slots = gl.maximum(gl.load(p_length).to(gl.int32) - start, 0)
    tiles = (slots + SLOTS - 1) // SLOTS
    first = start + split * tiles // splits * SLOTS
    last = gl.minimum(start + (split + 1) * tiles // splits * SLOTS, start + slots)
    count = (gl.maximum(last - first, 0) + SLOTS - 1) // SLOTS
    first_row = row.to(gl.int32) * capacity

    latents = gl.allocate_shared_memory(DTYPE, [2, SLOTS, BLOCK_R], t_latent.layout)
    ropes = gl.allocate_shared_memory(DTYPE, [2, SLOTS, BLOCK_D], t_rope.layout)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    weights = gl.allocate_shared_memory(DTYPE, [HEADS, SLOTS], P_SHARED)
    for n in gl.static_range(2):
        mbarrier.init(ready.index(n), count=1)
    fence_async_shared()
    barrier()
    if slots >= SLOTS:
        for n in gl.static_range(2):
            _fetch(t_latent, t_rope, latents, ropes, ready, first_row, first + n * SLOTS, last, n, n < count, SLOTS)
    elif count > 0:
        # A row shorter than a tile. Masked loads give zeros: what the cache holds beyond it enters no product.
        at = row * latent_row + first.to(gl.int64) * latent_slot
        latents.index(0).store(_rows(p_latent + at, 0, latent_slot, last - first, SLOTS, R, BLOCK_R))
        at = row * rope_row + first.to(gl.int64) * rope_slot
        ropes.index(0).store(_rows(p_rope + at, 0, rope_slot, last - first, SLOTS, D_R, BLOCK_D))
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(0), count=1)

    block = (program % BLOCKS) * HEADS
    b_q = _rows(p_q + row * q_row, block, q_head, H, HEADS, R, BLOCK_R)
    query = gl.allocate_shared_memory(DTYPE, [HEADS, BLOCK_R], t_latent.layout, b_q.to(DTYPE))
    b_q_rope = _rows(p_q_rope + row * q_rope_row, block, q_rope_head, H, HEADS, D_R, BLOCK_D)
    query_rope = gl.allocate_shared_memory(DTYPE, [HEADS, BLOCK_D], t_rope.layout, b_q_rope.to(DTYPE))
    fence_async_shared()
    barrier()

    slot = gl.arange(0, SLOTS, gl.SliceLayout(0, SCORES))
    b_most = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_sums = gl.zeros([HEADS, SLOTS], gl.float32, SCORES)
    out = warpgroup_mma_init(gl.zeros([HEADS, BLOCK_R], gl.float32, RESULT))
    # Once at least: an entry that skips the loop would be a path on which ptxas cannot keep products in flight.
    for n in range(gl.maximum(count, 1)):
        latent, rope = latents.index(n & 1), ropes.index(n & 1)
        mbarrier.wait(ready.index(n & 1), (n >> 1) & 1, pred=n < count)
        scores = warpgroup_mma_init(gl.zeros([HEADS, SLOTS], gl.float32, SCORES))
        scores = warpgroup_mma(query_rope, rope.permute((1, 0)), scores, use_acc=False, is_async=True)
        # Tensor cores work in order: the product of the tile before has ended too, its buffer and weights are free.
        b_out, b_scores = warpgroup_mma_wait(0, deps=(out, scores))
        barrier()
        if n > 0:
            ahead = first + (n + 1) * SLOTS
            _fetch(t_latent, t_rope, latents, ropes, ready, first_row, ahead, last, (n + 1) & 1, n + 1 < count, SLOTS)
        b_scores = warpgroup_mma(query, latent.permute((1, 0)), b_scores)
        begin = first + n * SLOTS
        place = gl.where(slots >= SLOTS, gl.minimum(begin, last - SLOTS), begin)
        unseen = (slot >= begin - place) & (slot < last - place)
        b_scores = gl.where(unseen[None, :], b_scores * scale_log2, float("-inf"))
        # Some slot of a tile is always valid, so the new maximum is finite and no difference is inf - inf.
        b_new = gl.maximum(b_most, gl.max(b_scores, axis=1))
        b_decay = gl.exp2(b_most - b_new)
        b_weights = gl.exp2(b_scores - b_new[:, None])
        b_sums = b_sums * b_decay[:, None] + b_weights
        weights.store(b_weights.to(DTYPE))
        b_out = b_out * gl.convert_layout(b_decay, gl.SliceLayout(1, RESULT))[:, None]
        fence_async_shared()
        barrier()
        out = warpgroup_mma(weights, latent, b_out, is_async=True)
        b_most = b_new
    b_out = warpgroup_mma_wait(0, deps=(out,))
    for n in gl.static_range(2):
        mbarrier.invalidate(ready.index(n))

    # A part without slots has been through the loop once with whatever shared memory held.
    b_sum = gl.where(count > 0, gl.sum(b_sums, axis=1), 1.0)
    b_out = b_out / gl.convert_layout(b_sum, gl.SliceLayout(1, RESULT))[:, None]
    b_out = gl.where(count > 0, b_out, 0.0)
    head, column = (
        block + gl.arange(0, HEADS, gl.SliceLayout(1, RESULT)),
        gl.arange(0, BLOCK_R, gl.SliceLayout(0, RESULT)),
    )
    at = (row * H + head) * splits + split
    p_target = p_out + at[:, None] * R + column[None, :]
    gl.store(p_target, b_out.to(p_out.dtype.element_ty), mask=(head < H)[:, None] & (column < R)[None, :])
    if PARTS:
        head = block + gl.arange(0, HEADS, gl.SliceLayout(1, SCORES))
        b_exponent = gl.where(count > 0, b_most + gl.log2(b_sum), float("-inf"))
        gl.store(p_exponent + (row * H + head) * splits + split, b_exponent, mask=head < H)


@gluon.jit
def _fetch(t_latent, t_rope, latents, ropes, ready, first_row, begin, last, buffer, wanted, SLOTS: gl.constexpr):
    """Start copying a whole tile: it begins early enough to end in the range."""
    place = first_row + gl.minimum(begin, last - SLOTS)
    bar = ready.index(buffer)
    mbarrier.expect(bar, t_latent.block_type.nbytes + t_rope.block_type.nbytes, pred=wanted)
    copy_tile(t_latent, [place, 0], bar, latents.index(buffer), pred=wanted)
    copy_tile(t_rope, [place, 0], bar, ropes.index(buffer), pred=wanted)


@gluon.jit
def _rows(p_rows, first, stride, end, COUNT: gl.constexpr, WIDTH: gl.constexpr, BLOCK: gl.constexpr):
    """[COUNT, BLOCK] of a matrix from row `first` on, zeros from row `end` and column WIDTH on."""
    LANES: gl.constexpr = min(BLOCK // 8, 32)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [8, 1], [1, 0])
    index = first + gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    p_tile = p_rows + index[:, None].to(gl.int64) * stride + column[None, :]
    return gl.load(p_tile, mask=(index < end)[:, None] & (column < WIDTH)[None, :], other=0.0)
