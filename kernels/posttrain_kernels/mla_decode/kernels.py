"""Latent attention of one token a row in Triton: one read of the latents for scores and values, split over slots.

Each program takes HEADS query heads and one of `splits` parts of a row's slots. A tile of SLOTS latents stays in shared
memory for both products. With SLOTS_FIRST the products are transposed, `latent qᵀ` and `latentᵀ weightsᵀ`: the 64 rows
that a Hopper matrix instruction has at least are then slots and latent columns, not padding of few heads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# Not specialised: the number of splits follows the batch, and a program for 16 of them is no better.
@triton.jit(do_not_specialize=["splits", "capacity"])
def mla_decode_kernel(
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
    H: tl.constexpr,
    R: tl.constexpr,
    D_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS_FIRST: tl.constexpr,
    TMA: tl.constexpr,
    DENSE: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
        if PARTS:
            # Programs of the combination find room beside this kernel's, and wait there.
            gdc_launch_dependents()
    # Blocks of heads of one row are neighbours in launch order: the second finds the latents in the L2 cache.
    BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    program, split = tl.program_id(0), tl.program_id(1)
    row = (program // BLOCKS).to(tl.int64)
    head = (program % BLOCKS) * HEADS + tl.arange(0, HEADS)
    start = tl.load(p_start + row).to(tl.int32)
    first, last, has_tile = _part(start, tl.load(p_length).to(tl.int32), split, splits, SLOTS)

    column, r_column = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    b_q = _rows(p_q + row * q_row, head, q_head, column, head < H, H % HEADS != 0, R, BLOCK_R)
    b_q_rope = _rows(p_q_rope + row * q_rope_row, head, q_rope_head, r_column, head < H, H % HEADS != 0, D_R, BLOCK_D)
    b_q, b_q_rope = b_q.to(p_latent.dtype.element_ty), b_q_rope.to(p_latent.dtype.element_ty)
    if DENSE:
        latent_slot, rope_slot = R, D_R
    p_latent += row * latent_row
    p_rope += row * rope_row

    b_most = tl.full([HEADS], float("-inf"), tl.float32)
    b_sum = tl.zeros([HEADS], tl.float32)
    b_out = tl.zeros([BLOCK_R, HEADS] if SLOTS_FIRST else [HEADS, BLOCK_R], tl.float32)
    slot = tl.arange(0, SLOTS)
    # Whole tiles alone, so that no load needs a mask: the last one starts early enough to end in the range, and its
    # slots in front of `begin` have been seen. A row shorter than a tile is left to the second loop.
    whole = tl.where(has_tile, last, first)
    for begin in tl.range(first, whole, SLOTS, num_stages=STAGES):
        place = tl.minimum(begin, last - SLOTS)
        if TMA:
            tile = row.to(tl.int32) * capacity + place
            b_k, b_k_rope = t_latent.load([tile, 0]), t_rope.load([tile, 0])
        else:
            at = place.to(tl.int64)
            b_k = _rows(p_latent + at * latent_slot, slot, latent_slot, column, slot < SLOTS, False, R, BLOCK_R)
            b_k_rope = _rows(p_rope + at * rope_slot, slot, rope_slot, r_column, slot < SLOTS, False, D_R, BLOCK_D)
        unseen = slot >= begin - place
        b_most, b_sum, b_out = _step(
            b_q, b_q_rope, b_k, b_k_rope, unseen, b_most, b_sum, b_out, scale_log2, SLOTS_FIRST
        )
    # Masked loads give zeros: what the cache holds outside the range enters no product.
    for begin in tl.range(whole, last, SLOTS, num_stages=STAGES):
        at, valid = (begin + tl.zeros([], tl.int32)).to(tl.int64), slot < last - begin
        b_k = _rows(p_latent + at * latent_slot, slot, latent_slot, column, valid, True, R, BLOCK_R)
        b_k_rope = _rows(p_rope + at * rope_slot, slot, rope_slot, r_column, valid, True, D_R, BLOCK_D)
        b_most, b_sum, b_out = _step(b_q, b_q_rope, b_k, b_k_rope, valid, b_most, b_sum, b_out, scale_log2, SLOTS_FIRST)

    # A part without slots has sum 0: its mean is zero and its exponent -inf.
    b_divisor = tl.where(b_sum > 0, b_sum, 1.0)
    place = (row * H + head) * splits + split
    is_head = head < H
    if SLOTS_FIRST:
        b_out = b_out / b_divisor[None, :]
        p_target = p_out + place[None, :] * R + column[:, None]
        tl.store(p_target, b_out.to(p_out.dtype.element_ty), mask=is_head[None, :] & (column < R)[:, None])
    else:
        b_out = b_out / b_divisor[:, None]
        p_target = p_out + place[:, None] * R + column[None, :]
        tl.store(p_target, b_out.to(p_out.dtype.element_ty), mask=is_head[:, None] & (column < R)[None, :])
    if PARTS:
        tl.store(p_exponent + place, b_most + tl.log2(b_sum), mask=is_head)


@triton.jit(do_not_specialize=["splits", "places"])
def combine_parts_kernel(
    p_parts,
    p_exponent,
    p_out,
    places,
    splits,
    R: tl.constexpr,
    PLACES: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """COLUMNS columns of PLACES heads, of `places` in all rows: their parts' means weighted by 2^exponent."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    at = place[:, None] * splits + split[None, :]
    valid = (place < places)[:, None] & (split < splits)[None, :]
    b_exponent = tl.load(p_exponent + at, mask=valid, other=float("-inf"))
    p_part = p_parts + at[:, :, None] * R + column[None, None, :]
    b_part = tl.load(p_part, mask=valid[:, :, None] & (column < R)[None, None, :], other=0.0).to(tl.float32)
    b_most = tl.max(b_exponent, axis=1)
    # All parts empty: any finite maximum makes every weight zero instead of NaN.
    b_weight = tl.exp2(b_exponent - tl.where(b_most == float("-inf"), 0.0, b_most)[:, None])
    b_divisor = tl.sum(b_weight, axis=1)
    b_mean = tl.sum(b_weight[:, :, None] * b_part, axis=1) / tl.where(b_divisor > 0, b_divisor, 1.0)[:, None]
    p_target = p_out + place[:, None] * R + column[None, :]
    tl.store(p_target, b_mean.to(p_out.dtype.element_ty), mask=(place < places)[:, None] & (column < R)[None, :])


@triton.jit
def _part(start, length, split, splits, SLOTS: tl.constexpr):
    """The slots [first, last) of one split, and whether the row has a whole tile: shares differ by one tile at most."""
    slots = tl.maximum(length - start, 0)
    tiles = tl.cdiv(slots, SLOTS)
    first = start + split * tiles // splits * SLOTS
    last = start + (split + 1) * tiles // splits * SLOTS
    return first, tl.minimum(last, start + slots), slots >= SLOTS


@triton.jit
def _rows(p_rows, index, stride, column, valid, RAGGED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[len(index), BLOCK] of a matrix: rows by index, `valid` ones alone where RAGGED, columns padded with zeros."""
    # 64 bits: with slots in front of rows, [S, B, d], a slot's stride holds the whole batch.
    p_tile = p_rows + index[:, None].to(tl.int64) * stride + column[None, :]
    if RAGGED:
        return tl.load(p_tile, mask=valid[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _step(b_q, b_q_rope, b_k, b_k_rope, valid, b_most, b_sum, b_out, scale_log2, SLOTS_FIRST: tl.constexpr):
    """One tile of the online softmax: new maximum, sum and weighted latents."""
    # Some slot of a tile is always valid, so the new maximum is finite and no difference is inf - inf.
    if SLOTS_FIRST:
        b_scores = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_scores = tl.dot(b_k_rope, tl.trans(b_q_rope), b_scores, input_precision="ieee")
        b_scores = tl.where(valid[:, None], b_scores * scale_log2, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_scores, axis=0))
        b_decay = tl.exp2(b_most - b_new)
        b_weights = tl.exp2(b_scores - b_new[None, :])
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=0)
        b_out = b_out * b_decay[None, :]
        b_out = tl.dot(tl.trans(b_k), b_weights.to(b_k.dtype), b_out, input_precision="ieee")
    else:
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_scores = tl.dot(b_q_rope, tl.trans(b_k_rope), b_scores, input_precision="ieee")
        b_scores = tl.where(valid[None, :], b_scores * scale_log2, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_scores, axis=1))
        b_decay = tl.exp2(b_most - b_new)
        b_weights = tl.exp2(b_scores - b_new[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_weights, axis=1)
        b_out = b_out * b_decay[:, None]
        b_out = tl.dot(b_weights.to(b_k.dtype), b_k, b_out, input_precision="ieee")
    return b_new, b_sum, b_out
