"""Attention of one token a row over a cache in Triton: split over slots, online softmax in fp32.

Each program takes HEADS query heads that share a key/value head, and one of SPLITS parts of the row's slots. With one
split it writes the result, otherwise the part's mean of values and its log2-sum-exp2 for `combine_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_attention_kernel(
    p_q,
    p_k,
    p_v,
    p_q_rope,
    p_k_rope,
    p_start,
    p_length,
    p_out,
    p_exponent,
    q_row,
    q_head,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    q_rope_row,
    q_rope_head,
    k_rope_row,
    k_rope_head,
    k_rope_slot,
    shared,
    scale_log2,
    GROUP: tl.constexpr,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
    DOT: tl.constexpr,
    ONE_CACHE: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    program, split = tl.program_id(0), tl.program_id(1)
    row = (program // (shared * BLOCKS)).to(tl.int64)
    key_head = ((program // BLOCKS) % shared).to(tl.int64)
    in_group = (program % BLOCKS) * HEADS + tl.arange(0, HEADS)
    head, is_head = key_head * GROUP + in_group, in_group < GROUP
    first, last = _part(tl.load(p_start + row), tl.load(p_length), split, SPLITS, SLOTS)

    k_column, v_column, r_column = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_R)
    p_query = p_q + row * q_row + head[:, None] * q_head + k_column[None, :]
    b_q = tl.load(p_query, mask=is_head[:, None] & (k_column < D_K)[None, :], other=0.0)
    p_k += row * k_row + key_head * k_head
    p_v += row * v_row + key_head * v_head
    if D_R > 0:
        p_query = p_q_rope + row * q_rope_row + head[:, None] * q_rope_head + r_column[None, :]
        b_q_rope = tl.load(p_query, mask=is_head[:, None] & (r_column < D_R)[None, :], other=0.0)
        p_k_rope += row * k_rope_row + key_head * k_rope_head

    b_most = tl.full([HEADS], float("-inf"), tl.float32)
    b_sum = tl.zeros([HEADS], tl.float32)
    b_out = tl.zeros([HEADS, BLOCK_V], tl.float32)
    for begin in tl.range(first, last, SLOTS, num_stages=STAGES):
        slot = begin + tl.arange(0, SLOTS)
        valid = slot < last
        # Masked loads give zeros: whatever the cache holds outside the range never enters a product.
        b_k = _tile(p_k, slot, k_slot, k_column, valid, D_K)
        b_scores = _scores(b_q, b_k, DOT)
        if D_R > 0:
            b_k_rope = _tile(p_k_rope, slot, k_rope_slot, r_column, valid, D_R)
            b_scores += _scores(b_q_rope, b_k_rope, DOT)
        b_v = b_k
        if not ONE_CACHE:
            b_v = _tile(p_v, slot, v_slot, v_column, valid, D_V)
        b_scores = tl.where(valid[None, :], b_scores * scale_log2, float("-inf"))
        # The first slot of a tile is always valid, so the new maximum is finite and no difference is inf - inf.
        b_new = tl.maximum(b_most, tl.max(b_scores, axis=1))
        b_decay = tl.exp2(b_most - b_new)
        b_weights = tl.exp2(b_scores - b_new[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_out = b_out * b_decay[:, None] + _mix(b_weights, b_v, DOT)
        b_most = b_new

    # A part without slots has sum 0: its mean is zero and its exponent -inf.
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    place = (row * shared * GROUP + head) * SPLITS + split
    p_target = p_out + place[:, None] * D_V + v_column[None, :]
    tl.store(p_target, b_out.to(p_out.dtype.element_ty), mask=is_head[:, None] & (v_column < D_V)[None, :])
    if SPLITS > 1:
        tl.store(p_exponent + place, b_most + tl.log2(b_sum), mask=is_head)


@triton.jit
def combine_kernel(p_parts, p_exponent, p_out, SPLITS: tl.constexpr, D_V: tl.constexpr, BLOCK_V: tl.constexpr):
    """One head of one row: the parts' means weighted by 2^exponent."""
    CHUNK: tl.constexpr = 16
    place = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_V)
    b_most = tl.full([], float("-inf"), tl.float32)
    for begin in tl.static_range(0, SPLITS, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        b_exponent = tl.load(p_exponent + place * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
        b_most = tl.maximum(b_most, tl.max(b_exponent, axis=0))
    # All parts empty: any finite maximum makes every weight zero instead of NaN.
    b_most = tl.where(b_most == float("-inf"), 0.0, b_most)
    b_sum = tl.zeros([], tl.float32)
    b_out = tl.zeros([BLOCK_V], tl.float32)
    for begin in tl.static_range(0, SPLITS, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        b_exponent = tl.load(p_exponent + place * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
        b_weight = tl.exp2(b_exponent - b_most)
        p_part = p_parts + (place * SPLITS + split)[:, None] * D_V + column[None, :]
        b_part = tl.load(p_part, mask=(split < SPLITS)[:, None] & (column < D_V)[None, :], other=0.0)
        b_sum += tl.sum(b_weight, axis=0)
        b_out += tl.sum(b_weight[:, None] * b_part, axis=0)
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)
    tl.store(p_out + place * D_V + column, b_out.to(p_out.dtype.element_ty), mask=column < D_V)


@triton.jit
def _part(start, length, split, SPLITS: tl.constexpr, SLOTS: tl.constexpr):
    """The slots [first, last) of one split: equal shares of the row's range, in whole tiles."""
    start, length = start.to(tl.int32), length.to(tl.int32)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), SPLITS), SLOTS) * SLOTS
    first = start + split * share
    return first, tl.minimum(first + share, length)


@triton.jit
def _tile(p_cache, slot, stride, column, valid, WIDTH: tl.constexpr):
    """[SLOTS, BLOCK] of a cache."""
    # 64 bits: with slots in front of rows, [S, B, G, d], a slot's stride holds the whole batch.
    p_tile = p_cache + slot[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(p_tile, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _scores(b_q, b_k, DOT: tl.constexpr):
    """q kᵀ, [HEADS, SLOTS] in fp32."""
    if DOT:
        return tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), input_precision="ieee")
    else:
        return tl.sum(b_q.to(tl.float32)[:, None, :] * b_k.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def _mix(b_weights, b_v, DOT: tl.constexpr):
    """weights · v, [HEADS, BLOCK_V] in fp32."""
    if DOT:
        return tl.dot(b_weights.to(b_v.dtype), b_v, input_precision="ieee")
    else:
        return tl.sum(b_weights[:, :, None] * b_v.to(tl.float32)[None, :, :], axis=1)
