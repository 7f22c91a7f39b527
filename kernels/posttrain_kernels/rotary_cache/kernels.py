"""Rotary embedding and cache writes in Triton: both halves of a tile of heads are rotated in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _table(p_table, stride, position, column, valid, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """Both halves of a table's row, rounded to the model's dtype as eager rounds them, in fp32."""
    p_row = p_table + position * stride + column
    b_first = tl.load(p_row, mask=valid, other=0.0).to(dtype).to(tl.float32)
    b_second = tl.load(p_row + WIDTH // 2, mask=valid, other=0.0).to(dtype).to(tl.float32)
    return b_first, b_second


@triton.jit
def _turn(b_x, b_partner, b_cos, b_sin, dtype: tl.constexpr):
    """x·cos + partner·sin with eager's three roundings; b_partner is the other half, negated for the first."""
    b_direct = (b_x * b_cos).to(dtype).to(tl.float32)
    b_cross = (b_partner * b_sin).to(dtype).to(tl.float32)
    return (b_direct + b_cross).to(dtype)


@triton.jit
def _normalise(b_first, b_second, b_weight_first, b_weight_second, eps, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """RMSNorm of heads [HEADS, HALF] · 2, rounded as eager: cast, then times the weight, then cast."""
    b_square = tl.sum(b_first * b_first, axis=1) + tl.sum(b_second * b_second, axis=1)
    b_scale = tl.rsqrt(b_square / WIDTH + eps)[:, None]
    b_first = (b_first * b_scale).to(dtype).to(tl.float32) * b_weight_first
    b_second = (b_second * b_scale).to(dtype).to(tl.float32) * b_weight_second
    return b_first.to(dtype).to(tl.float32), b_second.to(dtype).to(tl.float32)


@triton.jit
def _weights(p_q_norm, p_k_norm, column, valid, is_q):
    """Each head's weight of the norm, [HEADS, HALF]."""
    b_query = tl.load(p_q_norm + column, mask=valid, other=0.0).to(tl.float32)
    b_key = tl.load(p_k_norm + column, mask=valid, other=0.0).to(tl.float32)
    return tl.where(is_q, b_query, b_key)


@triton.jit
def rotary_cache_kernel(
    p_qkv,
    p_cos,
    p_sin,
    p_positions,
    p_slot,
    p_q_norm,
    p_k_norm,
    p_out,
    p_k,
    p_v,
    qkv_stride,
    cos_stride,
    sin_stride,
    k_row,
    k_head,
    k_slot,
    v_row,
    v_head,
    v_slot,
    heads,
    shared,
    eps,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(p_positions + row), tl.load(p_slot).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = column < WIDTH // 2
    valid = inside & (head < heads + 2 * shared)
    dtype: tl.constexpr = p_qkv.dtype.element_ty
    p_first = p_qkv + row * qkv_stride + head * WIDTH + column
    b_first = tl.load(p_first, mask=valid, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + WIDTH // 2, mask=valid, other=0.0).to(tl.float32)
    is_q, is_k = head < heads, (head >= heads) & (head < heads + shared)
    is_v = head >= heads + shared
    # One tile for all kinds of heads: values take the arithmetic too and are stored as they came.
    b_normal_first, b_normal_second = b_first, b_second
    if NORM:
        b_scale_first = _weights(p_q_norm, p_k_norm, column, inside, is_q)
        b_scale_second = _weights(p_q_norm, p_k_norm, column + WIDTH // 2, inside, is_q)
        b_normal_first, b_normal_second = _normalise(
            b_first, b_second, b_scale_first, b_scale_second, eps, dtype, WIDTH
        )
    b_cos_first, b_cos_second = _table(p_cos, cos_stride, position, column, inside, dtype, WIDTH)
    b_sin_first, b_sin_second = _table(p_sin, sin_stride, position, column, inside, dtype, WIDTH)
    b_turned_first = _turn(b_normal_first, -b_normal_second, b_cos_first, b_sin_first, dtype)
    b_turned_second = _turn(b_normal_second, b_normal_first, b_cos_second, b_sin_second, dtype)

    p_query = p_out + (row * heads + head) * WIDTH + column
    tl.store(p_query, b_turned_first, mask=valid & is_q)
    tl.store(p_query + WIDTH // 2, b_turned_second, mask=valid & is_q)
    p_key = p_k + row * k_row + (head - heads).to(tl.int64) * k_head + slot * k_slot + column
    tl.store(p_key, b_turned_first.to(p_k.dtype.element_ty), mask=valid & is_k)
    tl.store(p_key + WIDTH // 2, b_turned_second.to(p_k.dtype.element_ty), mask=valid & is_k)
    p_value = p_v + row * v_row + (head - heads - shared).to(tl.int64) * v_head + slot * v_slot + column
    tl.store(p_value, b_first.to(p_v.dtype.element_ty), mask=valid & is_v)
    tl.store(p_value + WIDTH // 2, b_second.to(p_v.dtype.element_ty), mask=valid & is_v)


@triton.jit
def latent_cache_kernel(
    p_kv,
    p_cos,
    p_sin,
    p_positions,
    p_slot,
    p_norm,
    p_latent,
    p_rope,
    kv_stride,
    cos_stride,
    sin_stride,
    latent_row,
    latent_slot,
    rope_row,
    rope_slot,
    rank,
    eps,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position, slot = tl.load(p_positions + row), tl.load(p_slot).to(tl.int64)
    dtype: tl.constexpr = p_kv.dtype.element_ty
    column = tl.arange(0, BLOCK)
    b_latent = tl.load(p_kv + row * kv_stride + column, mask=column < rank, other=0.0)
    if NORM:
        b_weight = tl.load(p_norm + column, mask=column < rank, other=0.0).to(tl.float32)
        b_wide = b_latent.to(tl.float32)
        b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / rank + eps)
        b_latent = ((b_wide * b_scale).to(dtype).to(tl.float32) * b_weight).to(dtype)
    p_target = p_latent + row * latent_row + slot * latent_slot + column
    tl.store(p_target, b_latent.to(p_latent.dtype.element_ty), mask=column < rank)

    turned = tl.arange(0, HALF)
    inside = turned < WIDTH // 2
    p_first = p_kv + row * kv_stride + rank + turned
    b_first = tl.load(p_first, mask=inside, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + WIDTH // 2, mask=inside, other=0.0).to(tl.float32)
    b_cos_first, b_cos_second = _table(p_cos, cos_stride, position, turned, inside, dtype, WIDTH)
    b_sin_first, b_sin_second = _table(p_sin, sin_stride, position, turned, inside, dtype, WIDTH)
    p_target = p_rope + row * rope_row + slot * rope_slot + turned
    b_turned_first = _turn(b_first, -b_second, b_cos_first, b_sin_first, dtype)
    b_turned_second = _turn(b_second, b_first, b_cos_second, b_sin_second, dtype)
    tl.store(p_target, b_turned_first.to(p_rope.dtype.element_ty), mask=inside)
    tl.store(p_target + WIDTH // 2, b_turned_second.to(p_rope.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    p_x,
    p_cos,
    p_sin,
    p_positions,
    p_out,
    x_row,
    x_head,
    cos_stride,
    sin_stride,
    heads,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(p_positions + row)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = column < WIDTH // 2
    valid = inside & (head < heads)
    dtype: tl.constexpr = p_x.dtype.element_ty
    p_first = p_x + row * x_row + head * x_head + column
    b_first = tl.load(p_first, mask=valid, other=0.0).to(tl.float32)
    b_second = tl.load(p_first + WIDTH // 2, mask=valid, other=0.0).to(tl.float32)
    b_cos_first, b_cos_second = _table(p_cos, cos_stride, position, column, inside, dtype, WIDTH)
    b_sin_first, b_sin_second = _table(p_sin, sin_stride, position, column, inside, dtype, WIDTH)
    p_target = p_out + (row * heads + head) * WIDTH + column
    tl.store(p_target, _turn(b_first, -b_second, b_cos_first, b_sin_first, dtype), mask=valid)
    tl.store(p_target + WIDTH // 2, _turn(b_second, b_first, b_cos_second, b_sin_second, dtype), mask=valid)
