"""Latent attention of one token a row, 64 or 128 heads a program, for narrow latents, in Gluon with specialised warps.

A group of four warps has 64 heads, their scores and their result. The product with the latents of one tile runs beside
the softmax of the next; with two groups, one's softmax also runs beside the other's products. Four more warps load the
queries and start the copies.
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .gluon_parts import barrier, copy_tile, hide, part, rows, scaled, store_result


@gluon.jit(do_not_specialize=["splits", "capacity"])
def mla_decode_narrow_kernel(
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
    STAGES: gl.constexpr,
):
    DTYPE: gl.constexpr = t_latent.dtype
    BLOCKS: gl.constexpr = (H + HEADS - 1) // HEADS
    gdc_wait()
    program, split = gl.program_id(0), gl.program_id(1)
    row, block = (program // BLOCKS).to(gl.int64), (program % BLOCKS) * HEADS
    start, length = gl.load(p_start + row).to(gl.int32), gl.load(p_length)
    # Loaded before the first copies start, and stored behind them: neither waits for the other.
    b_q = rows(p_q + row * q_row, block, q_head, H, 0, HEADS, R, BLOCK_R)
    b_q_rope = rows(p_q_rope + row * q_rope_row, block, q_rope_head, H, 0, HEADS, D_R, BLOCK_D)
    first, last, count, whole = part(start, length, split, splits, SLOTS)
    first_row = row.to(gl.int32) * capacity

    latents = gl.allocate_shared_memory(DTYPE, [STAGES, SLOTS, BLOCK_R], t_latent.layout)
    ropes = gl.allocate_shared_memory(DTYPE, [STAGES, SLOTS, BLOCK_D], t_rope.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(free.index(n), count=HEADS // 64)
    fence_async_shared()
    barrier()
    if whole:
        for n in gl.static_range(STAGES):
            _fetch(t_latent, t_rope, latents, ropes, full, first_row, first + n * SLOTS, last, n, n < count, SLOTS)
    elif count > 0:
        # A row shorter than a tile. Masked loads give zeros: what the cache holds beyond it enters no product.
        at = row * latent_row + first.to(gl.int64) * latent_slot
        latents.index(0).store(rows(p_latent + at, 0, latent_slot, last - first, 0, SLOTS, R, BLOCK_R))
        at = row * rope_row + first.to(gl.int64) * rope_slot
        ropes.index(0).store(rows(p_rope + at, 0, rope_slot, last - first, 0, SLOTS, D_R, BLOCK_D))
        fence_async_shared()
        barrier()
        mbarrier.arrive(full.index(0), count=1)

    query = gl.allocate_shared_memory(DTYPE, [HEADS, BLOCK_R], t_latent.layout, b_q.to(DTYPE))
    query_rope = gl.allocate_shared_memory(DTYPE, [HEADS, BLOCK_D], t_rope.layout, b_q_rope.to(DTYPE))
    fence_async_shared()
    barrier()
    at = (row * H + block) * splits + split
    p_out += at * R
    if PARTS:
        p_exponent += at
    outer = (p_out, p_exponent, H - block, splits, first, last, count, whole, scale_log2)
    copies = (t_latent, t_rope, latents, ropes, full, free, first_row, first, last, count, SLOTS, STAGES)
    buffers = (query, query_rope, latents, ropes, full, free)
    if HEADS == 128:
        gl.warp_specialize(
            [
                (_copy_tiles, copies),
                (_attend, (outer, buffers, 0, R, STAGES, PARTS)),
                (_attend, (outer, buffers, 1, R, STAGES, PARTS)),
            ],
            [4, 4],
            [240, 240],
        )
    else:
        gl.warp_specialize([(_copy_tiles, copies), (_attend, (outer, buffers, 0, R, STAGES, PARTS))], [4], [216])


@gluon.jit
def _copy_tiles(
    t_latent,
    t_rope,
    latents,
    ropes,
    full,
    free,
    first_row,
    first,
    last,
    count,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
):
    for n in range(STAGES, count):
        stage = n % STAGES
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        _fetch(t_latent, t_rope, latents, ropes, full, first_row, first + n * SLOTS, last, stage, True, SLOTS)


@gluon.jit
def _attend(outer, buffers, GROUP: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):
    p_out, p_exponent, heads, splits, first, last, count, whole, scale_log2 = outer
    query, query_rope, latents, ropes, full, free = buffers
    HEADS: gl.constexpr = 64
    SLOTS: gl.constexpr = latents.shape[1]
    BLOCK_R: gl.constexpr = latents.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SLOTS, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_R, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    query, query_rope = query.slice(GROUP * HEADS, HEADS), query_rope.slice(GROUP * HEADS, HEADS)
    b_most = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    b_sum = gl.zeros([HEADS], gl.float32, gl.SliceLayout(1, SCORES))
    b_out = gl.zeros([HEADS, BLOCK_R], gl.float32, RESULT)
    if count > 0:
        mbarrier.wait(full.index(0), 0)
        scores = _scores(query, query_rope, latents.index(0), ropes.index(0), SCORES)
        b_scores = warpgroup_mma_wait(0, deps=(scores,))
        if count == 1:
            b_scores = hide(b_scores, first, last, whole, SLOTS, SCORES)
        # Some slot of a tile is always valid, so the maximum is finite and no difference is inf - inf.
        b_most = gl.max(b_scores, axis=1) * scale_log2
        b_weights = gl.exp2(b_scores * scale_log2 - b_most[:, None])
        b_sum = gl.sum(b_weights, axis=1)
        b_operand = gl.convert_layout(b_weights.to(query.dtype), WEIGHTS)
        for n in range(1, count):
            stage, before = n % STAGES, (n - 1) % STAGES
            mbarrier.wait(full.index(stage), (n // STAGES) & 1)
            scores = _scores(query, query_rope, latents.index(stage), ropes.index(stage), SCORES)
            out = warpgroup_mma(b_operand, latents.index(before), b_out, is_async=True)
            b_scores = warpgroup_mma_wait(1, deps=(scores,))
            if n + 1 == count:
                b_scores = hide(b_scores, first + n * SLOTS, last, whole, SLOTS, SCORES)
            b_new = gl.maximum(b_most, gl.max(b_scores, axis=1) * scale_log2)
            b_decay = gl.exp2(b_most - b_new)
            b_weights = gl.exp2(b_scores * scale_log2 - b_new[:, None])
            b_sum = b_sum * b_decay + gl.sum(b_weights, axis=1)
            b_out = warpgroup_mma_wait(0, deps=(out,))
            mbarrier.arrive(free.index(before), count=1)
            b_operand = gl.convert_layout(b_weights.to(query.dtype), WEIGHTS)
            b_out = scaled(b_out, b_decay, RESULT)
            b_most = b_new
        b_out = warpgroup_mma(b_operand, latents.index((count - 1) % STAGES), b_out)
    if PARTS:
        # Not earlier: what the combination's programs need is taken, and those of the first multiprocessors that become
        # free would have to do all of it.
        gdc_launch_dependents()
    # A part without slots has sum 0: its mean is zero and its exponent -inf.
    b_out = scaled(b_out, 1.0 / gl.where(b_sum > 0, b_sum, 1.0), RESULT)
    p_target, left_heads = p_out + GROUP * HEADS * splits * R, heads - GROUP * HEADS
    store_result(p_target, b_out, query, left_heads, splits, 0, R, HEADS, BLOCK_R, RESULT)
    if PARTS:
        head = GROUP * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, SCORES))
        gl.store(p_exponent + head * splits, b_most + gl.log2(b_sum), mask=head < heads)


@gluon.jit
def _scores(query, query_rope, latent, rope, SCORES: gl.constexpr):
    HEADS: gl.constexpr = query.shape[0]
    SLOTS: gl.constexpr = latent.shape[0]
    zeros = gl.zeros([HEADS, SLOTS], gl.float32, SCORES)
    scores = warpgroup_mma(query_rope, rope.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return warpgroup_mma(query, latent.permute((1, 0)), scores, is_async=True)


@gluon.jit
def _fetch(t_latent, t_rope, latents, ropes, full, first_row, begin, last, stage, wanted, SLOTS: gl.constexpr):
    """Start copying a whole tile: it begins early enough to end in the range."""
    place, bar = first_row + gl.minimum(begin, last - SLOTS), full.index(stage)
    mbarrier.expect(bar, t_latent.block_type.nbytes + t_rope.block_type.nbytes, pred=wanted)
    copy_tile(t_latent, [place, 0], bar, latents.index(stage), pred=wanted)
    copy_tile(t_rope, [place, 0], bar, ropes.index(stage), pred=wanted)
