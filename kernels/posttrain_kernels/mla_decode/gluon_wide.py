"""Latent attention of one token a row, 64 heads a program, for wide latents, in Gluon with specialised warps.

The result of 64 heads fills the registers of two groups of four warps, and shared memory has room for two tiles. So
each group holds one half of the latent columns of the result, and computes the scores of every second tile: while one
is at its softmax the other keeps the tensor cores busy (as FlashMLA does). The weights of a tile go to both through
shared memory, with the running maximum. Four more warps load the queries and start the copies, half a tile at a time.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .gluon_parts import barrier, copy_tile, hide, part, rows, scaled, store_result


@gluon.jit(do_not_specialize=["splits", "capacity"])
def mla_decode_wide_kernel(
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
    HALF: gl.constexpr = BLOCK_R // 2
    BLOCKS: gl.constexpr = (H + HEADS - 1) // HEADS
    gdc_wait()
    program, split = gl.program_id(0), gl.program_id(1)
    row, block = (program // BLOCKS).to(gl.int64), (program % BLOCKS) * HEADS
    start, length = gl.load(p_start + row).to(gl.int32), gl.load(p_length)
    # Loaded before the first copies start, and stored behind them: neither waits for the other.
    b_left = rows(p_q + row * q_row, block, q_head, H, 0, HEADS, R, HALF)
    b_right = rows(p_q + row * q_row, block, q_head, H, HALF, HEADS, R, HALF)
    first, last, count, whole = part(start, length, split, splits, SLOTS)
    first_row = row.to(gl.int32) * capacity

    # Of two buffers the left and the right columns; `free` once the group that holds those columns has used them.
    latents = gl.allocate_shared_memory(DTYPE, [4, SLOTS, HALF], t_latent.layout)
    ropes = gl.allocate_shared_memory(DTYPE, [2, SLOTS, BLOCK_D], t_rope.layout)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    # Weights and maxima of either group's tile, and in the end their sums.
    weights = gl.allocate_shared_memory(DTYPE, [2, HEADS, SLOTS], gl.NVMMASharedLayout(128, 16))
    numbers = gl.allocate_shared_memory(gl.float32, [4, HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(4):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(free.index(n), count=1)
        mbarrier.init(ready.index(n), count=1)
    fence_async_shared()
    barrier()
    if whole:
        for n in gl.static_range(2):
            for step in gl.static_range(2):
                begin = first + n * SLOTS
                _fetch(t_latent, t_rope, latents, ropes, full, first_row, begin, last, n, n ^ step, n < count, SLOTS)
    elif count > 0:
        # A row shorter than a tile. Masked loads give zeros: what the cache holds beyond it enters no product.
        for side in gl.static_range(2):
            at = row * latent_row + first.to(gl.int64) * latent_slot
            latents.index(side).store(rows(p_latent + at, 0, latent_slot, last - first, side * HALF, SLOTS, R, HALF))
        at = row * rope_row + first.to(gl.int64) * rope_slot
        ropes.index(0).store(rows(p_rope + at, 0, rope_slot, last - first, 0, SLOTS, D_R, BLOCK_D))
        fence_async_shared()
        barrier()
        for side in gl.static_range(2):
            mbarrier.arrive(full.index(side), count=1)

    query = gl.allocate_shared_memory(DTYPE, [2, HEADS, HALF], t_latent.layout)
    query.index(0).store(b_left.to(DTYPE))
    query.index(1).store(b_right.to(DTYPE))
    fence_async_shared()
    barrier()
    at = (row * H + block) * splits + split
    p_out += at * R
    if PARTS:
        p_exponent += at
    p_q_rope += row * q_rope_row + block.to(gl.int64) * q_rope_head
    heads = H - block
    outer = (p_q_rope, q_rope_head, p_out, p_exponent, heads, splits, first, last, count, whole, scale_log2)
    buffers = (query, latents, ropes, weights, numbers, full, free, ready)
    gl.warp_specialize(
        [
            (_copy_tiles, (t_latent, t_rope, latents, ropes, full, free, first_row, first, last, count, SLOTS)),
            (_even_tiles, (outer, buffers, R, D_R, BLOCK_D, PARTS)),
            (_odd_tiles, (outer, buffers, R, D_R, BLOCK_D, PARTS)),
        ],
        [4, 4],
        [240, 240],
    )


@gluon.jit
def _copy_tiles(t_latent, t_rope, latents, ropes, full, free, first_row, first, last, count, SLOTS: gl.constexpr):
    for n in range(2, count):
        buffer = n & 1
        for step in gl.static_range(2):
            # The group that had the tile's scores is the first to be done with its columns.
            side = buffer ^ step
            mbarrier.wait(free.index(2 * buffer + side), ((n >> 1) & 1) ^ 1)
            begin = first + n * SLOTS
            _fetch(t_latent, t_rope, latents, ropes, full, first_row, begin, last, buffer, side, True, SLOTS)


@gluon.jit
def _even_tiles(outer, buffers, R: gl.constexpr, D_R: gl.constexpr, BLOCK_D: gl.constexpr, PARTS: gl.constexpr):
    """Scores of tiles 0, 2, ..., left columns of the result."""
    p_q_rope, q_rope_head, _, _, heads, _, first, last, count, whole, scale_log2 = outer
    query, latents, ropes, weights, numbers, full, free, ready = buffers
    HEADS: gl.constexpr = query.shape[1]
    SLOTS: gl.constexpr = latents.shape[1]
    HALF: gl.constexpr = latents.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    b_q_rope = _rope_query(p_q_rope, q_rope_head, heads, query.dtype, HEADS, D_R, BLOCK_D, SCORES)
    b_most = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_own = b_most
    b_sum = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
    b_out = gl.zeros([HEADS, HALF], gl.float32, RESULT)
    for n in range(0, count, 2):
        b_scores = _scores(b_q_rope, query, latents, ropes, full, 0, n, SCORES)
        if n + 1 == count:
            b_scores = hide(b_scores, first + n * SLOTS, last, whole, SLOTS, SCORES)
        # Some slot of a tile is always valid, so the new maximum is finite and no difference is inf - inf.
        b_new = gl.maximum(b_most, gl.max(b_scores, axis=1) * scale_log2)
        b_weights = gl.exp2(b_scores * scale_log2 - b_new[:, None])
        _publish(weights, numbers, ready, 0, b_weights, b_new)
        b_sum = b_sum * gl.exp2(b_own - b_new) + gl.sum(b_weights, axis=1)
        b_out = scaled(b_out, gl.exp2(b_most - b_new), RESULT)
        b_out = warpgroup_mma(weights.index(0), latents.index(0), b_out)
        mbarrier.arrive(free.index(0), count=1)
        b_own = b_new
        b_most = b_new
        if n + 1 < count:
            mbarrier.wait(ready.index(1), (n >> 1) & 1)
            b_new = numbers.index(1).load(gl.SliceLayout(1, SCORES))
            b_out = scaled(b_out, gl.exp2(b_most - b_new), RESULT)
            b_out = warpgroup_mma(weights.index(1), latents.index(2), b_out)
            mbarrier.arrive(free.index(2), count=1)
            b_most = b_new
    _finish(outer, latents.index(0), numbers, ready, b_most, b_own, b_sum, b_out, 0, R, PARTS, SCORES, RESULT)


@gluon.jit
def _odd_tiles(outer, buffers, R: gl.constexpr, D_R: gl.constexpr, BLOCK_D: gl.constexpr, PARTS: gl.constexpr):
    """Scores of tiles 1, 3, ..., right columns of the result."""
    p_q_rope, q_rope_head, _, _, heads, _, first, last, count, whole, scale_log2 = outer
    query, latents, ropes, weights, numbers, full, free, ready = buffers
    HEADS: gl.constexpr = query.shape[1]
    SLOTS: gl.constexpr = latents.shape[1]
    HALF: gl.constexpr = latents.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    b_q_rope = _rope_query(p_q_rope, q_rope_head, heads, query.dtype, HEADS, D_R, BLOCK_D, SCORES)
    b_most = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_own = b_most
    b_sum = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
    b_out = gl.zeros([HEADS, HALF], gl.float32, RESULT)
    for n in range(1, count, 2):
        b_scores = _scores(b_q_rope, query, latents, ropes, full, 1, n, SCORES)
        if n + 1 == count:
            b_scores = hide(b_scores, first + n * SLOTS, last, whole, SLOTS, SCORES)
        mbarrier.wait(ready.index(0), (n >> 1) & 1)
        b_other = numbers.index(0).load(gl.SliceLayout(1, SCORES))
        b_out = scaled(b_out, gl.exp2(b_most - b_other), RESULT)
        # Runs beside the softmax of its own tile.
        out = warpgroup_mma(weights.index(0), latents.index(1), b_out, is_async=True)
        b_new = gl.maximum(b_other, gl.max(b_scores, axis=1) * scale_log2)
        b_weights = gl.exp2(b_scores * scale_log2 - b_new[:, None])
        _publish(weights, numbers, ready, 1, b_weights, b_new)
        b_sum = b_sum * gl.exp2(b_own - b_new) + gl.sum(b_weights, axis=1)
        b_out = warpgroup_mma_wait(0, deps=(out,))
        mbarrier.arrive(free.index(1), count=1)
        b_out = scaled(b_out, gl.exp2(b_other - b_new), RESULT)
        b_out = warpgroup_mma(weights.index(1), latents.index(3), b_out)
        mbarrier.arrive(free.index(3), count=1)
        b_own = b_new
        b_most = b_new
    if count % 2 == 1:
        mbarrier.wait(ready.index(0), (count >> 1) & 1)
        b_new = numbers.index(0).load(gl.SliceLayout(1, SCORES))
        b_out = scaled(b_out, gl.exp2(b_most - b_new), RESULT)
        b_out = warpgroup_mma(weights.index(0), latents.index(1), b_out)
        b_most = b_new
    _finish(outer, latents.index(3), numbers, ready, b_most, b_own, b_sum, b_out, 1, R, PARTS, SCORES, RESULT)


@gluon.jit
def _scores(b_q_rope, query, latents, ropes, full, OWN: gl.constexpr, n, SCORES: gl.constexpr):
    # Always 0, which the compiler does not know: else it keeps 32 matrix descriptors in registers, and spills them.
    zero = n >> 30
    HEADS: gl.constexpr = query.shape[1]
    SLOTS: gl.constexpr = latents.shape[1]
    scores = gl.zeros([HEADS, SLOTS], gl.float32, SCORES)
    for step in gl.static_range(2):
        side = OWN ^ step
        mbarrier.wait(full.index(2 * OWN + side), (n >> 1) & 1)
        if step == 0:
            scores = warpgroup_mma(b_q_rope, ropes.index(OWN).permute((1, 0)), scores, use_acc=False, is_async=True)
        b_k = latents.index(zero + 2 * OWN + side).permute((1, 0))
        scores = warpgroup_mma(query.index(zero + side), b_k, scores, is_async=True)
    return warpgroup_mma_wait(0, deps=(scores,))


@gluon.jit
def _publish(weights, numbers, ready, OWN: gl.constexpr, b_weights, b_most):
    """To both groups. The other has used the weights before these: its columns of that tile have been copied anew."""
    weights.index(OWN).store(b_weights.to(weights.dtype))
    numbers.index(OWN).store(b_most)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ready.index(OWN), count=1)


@gluon.jit
def _finish(
    outer,
    stage,
    numbers,
    ready,
    b_most,
    b_own,
    b_sum,
    b_out,
    SIDE: gl.constexpr,
    R: gl.constexpr,
    PARTS: gl.constexpr,
    SCORES: gl.constexpr,
    RESULT: gl.constexpr,
):
    """The sum of both groups, the division, and the result."""
    _, _, p_out, p_exponent, heads, splits, _, _, _, _, _ = outer
    HEADS: gl.constexpr = b_out.shape[0]
    HALF: gl.constexpr = b_out.shape[1]
    b_sum = gl.where(b_sum > 0, b_sum * gl.exp2(b_own - b_most), 0.0)
    numbers.index(2 + SIDE).store(b_sum)
    barrier()
    mbarrier.arrive(ready.index(2 + SIDE), count=1)
    mbarrier.wait(ready.index(3 - SIDE), 0)
    b_sum += numbers.index(3 - SIDE).load(gl.SliceLayout(1, SCORES))
    # A part without slots has sum 0: its mean is zero and its exponent -inf.
    b_out = scaled(b_out, 1.0 / gl.where(b_sum > 0, b_sum, 1.0), RESULT)
    store_result(p_out, b_out, stage, heads, splits, SIDE * HALF, R, HEADS, HALF, RESULT)
    if PARTS and SIDE == 0:
        head = gl.arange(0, HEADS, gl.SliceLayout(1, SCORES))
        gl.store(p_exponent + head * splits, b_most + gl.log2(b_sum), mask=head < heads)


@gluon.jit
def _rope_query(
    p_q_rope,
    q_rope_head,
    heads,
    dtype: gl.constexpr,
    HEADS: gl.constexpr,
    D_R: gl.constexpr,
    BLOCK_D: gl.constexpr,
    SCORES: gl.constexpr,
):
    """In registers, as the left operand of the scores: shared memory has no room for it."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    head = gl.arange(0, HEADS, gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    p_tile = p_q_rope + head[:, None].to(gl.int64) * q_rope_head + column[None, :]
    return gl.load(p_tile, mask=(head < heads)[:, None] & (column < D_R)[None, :], other=0.0).to(dtype)


@gluon.jit
def _fetch(t_latent, t_rope, latents, ropes, full, first_row, begin, last, buffer, side, wanted, SLOTS: gl.constexpr):
    """Start copying one half of a whole tile, its rotary keys with the half of the group that computes its scores."""
    place = first_row + gl.minimum(begin, last - SLOTS)
    bar, with_rope = full.index(2 * buffer + side), wanted & (buffer == side)
    mbarrier.expect(bar, t_latent.block_type.nbytes + t_rope.block_type.nbytes, pred=with_rope)
    mbarrier.expect(bar, t_latent.block_type.nbytes, pred=wanted & (buffer != side))
    copy_tile(t_rope, [place, 0], bar, ropes.index(buffer), pred=with_rope)
    copy_tile(t_latent, [place, side * latents.shape[2]], bar, latents.index(2 * buffer + side), pred=wanted)
