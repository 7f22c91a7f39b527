"""Forward kernels of the scan in Triton: a program carries the state of one head through the chunks of a segment.

One segment (the whole row) reads x, b and c once and is the fastest where rows and heads fill the card. Where they do
not, a row is cut into segments, whose first states `state_kernels.py` computes before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LENGTHS, advance, load_decays, load_tile, load_whole, pair_decays, store_tile


@triton.jit(do_not_specialize=LENGTHS)
def chunk_scan_kernel(
    p_x, p_b, p_c, p_d, p_decays, p_resets, p_first, p_y, p_end,
    x_row, x_head, b_row, b_head, c_row, c_head, T, chunks, length, segments,
    x_token: tl.constexpr, b_token: tl.constexpr, c_token: tl.constexpr,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    FIRST: tl.constexpr, HAS_D: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_OUT: tl.constexpr,
):  # fmt: skip
    """Outputs of BLOCK_P of P columns of a head over one segment of a row, and the row's last state.

    Args:
        p_x, p_b, p_c: descriptors if TMA, see `load_tile`; and p_y if TMA_OUT.
        p_first: states before the segments, if FIRST, else zero.
        p_y: [B, T, H, P]; p_end: the state after the row.
        length: chunks of a segment.
    """
    blocks: tl.constexpr = P // BLOCK_P
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row = line // H
    head = line % H  # 64 bits: where heads lie before tokens, its address passes 2^31
    first_p = (tl.program_id(0) % blocks) * BLOCK_P
    part = tl.program_id(1)
    x_at, b_at = (head // X_SHARE) * x_head + first_p, (head // B_SHARE) * b_head
    c_at, y_at = (head // C_SHARE) * c_head, head * P + first_p
    if not TMA:
        p_x += row * x_row + x_at
        p_b += row * b_row + b_at
        p_c += row * c_row + c_at
    if not TMA_OUT:
        p_y += row * T * (H * P) + y_at
    p_decays += line * chunks * (4 * L)
    p_resets += row * chunks * L
    # Coordinates of the copy engine.
    token = row.to(tl.int32) * T
    x_at, b_at, c_at, y_at = x_at.to(tl.int32), b_at.to(tl.int32), c_at.to(tl.int32), y_at.to(tl.int32)
    d = tl.load(p_d + head).to(tl.float32) if HAS_D else 0.0
    # [N, BLOCK_P] in registers: no product has the state transposed.
    tile = (first_p + tl.arange(0, BLOCK_P))[None, :] * N + tl.arange(0, N)[:, None]

    b_state = tl.zeros([N, BLOCK_P], tl.float32)
    if FIRST:
        b_state += tl.load(p_first + (line * segments + part) * (P * N) + tile).to(tl.float32)
    begin = part * length
    for i in range(tl.minimum(length, chunks - begin)):
        start = (begin + i).to(tl.int64) * L
        left = (T - start).to(tl.int32)
        whole = load_whole(p_decays, p_resets, begin + i, L, PACKED)
        b_x = load_tile(p_x, token, x_at, start, x_token, left, L, BLOCK_P, TYPE, TMA)
        b_b = load_tile(p_b, token, b_at, start, b_token, left, L, N, TYPE, TMA)
        b_c = load_tile(p_c, token, c_at, start, c_token, left, L, N, TYPE, TMA)
        dt, high, low, resets, enter, leave = load_decays(p_decays, p_resets, begin + i, L, PACKED)
        b_y = tl.dot(b_c, b_state.to(TYPE), input_precision=PRECISION) * enter[:, None]
        b_mix = tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
        b_mix *= pair_decays(high, low, resets, L, PACKED, False, TYPE) * dt[None, :]
        b_y = tl.dot(b_mix.to(TYPE), b_x, acc=b_y, input_precision=PRECISION)
        if HAS_D:
            b_y += d * b_x.to(tl.float32)
        store_tile(p_y, token, y_at, start, H * P, left, b_y, L, BLOCK_P, TMA_OUT)
        b_state = advance(b_state, whole, b_b, b_x, leave * dt, TYPE, PRECISION)
    if part == segments - 1:
        tl.store(p_end + line * (P * N) + tile, b_state)


@triton.jit
def step_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_d, p_bias, p_state, p_y,
    x_row, x_head, dt_row, dt_head, b_row, b_head, c_row, c_head, state_row, state_head, state_p,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_D: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_P rows of a head's state [P, N] are read and written once, and give as many outputs."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = (tl.program_id(0) % H).to(tl.int64)
    at_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    at_n = tl.arange(0, BLOCK_N)
    in_p, in_n = at_p < P, at_n < N
    b_x = tl.load(p_x + row * x_row + (head // X_SHARE) * x_head + at_p, mask=in_p, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + row * b_row + (head // B_SHARE) * b_head + at_n, mask=in_n, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + row * c_row + (head // C_SHARE) * c_head + at_n, mask=in_n, other=0.0).to(tl.float32)
    dt = tl.load(p_dt + row * dt_row + head * dt_head).to(tl.float32)
    if BIAS:
        dt += tl.load(p_bias + head).to(tl.float32)
    if SOFTPLUS:
        dt = _softplus(dt)
    a = tl.load(p_a + head).to(tl.float32)
    p_tile = p_state + row * state_row + head * state_head + at_p[:, None] * state_p + at_n[None, :]
    inside = in_p[:, None] & in_n[None, :]
    b_state = tl.load(p_tile, mask=inside, other=0.0)
    b_state = b_state * tl.exp(dt * a) + (dt * b_x)[:, None] * b_b[None, :]
    tl.store(p_tile, b_state, mask=inside)
    b_y = tl.sum(b_state * b_c[None, :], axis=1)
    if HAS_D:
        b_y += tl.load(p_d + head).to(tl.float32) * b_x
    p_out = p_y + (row * H + head) * P + at_p
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=in_p)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), x itself above 20 as in torch; to the last bits where exp(x) is lost beside 1."""
    grown = tl.exp(tl.minimum(x, 20.0))
    more = 1.0 + grown
    less = more - 1.0
    small = tl.log(more) * (grown / tl.where(less == 0.0, 1.0, less))
    return tl.where(x > 20.0, x, tl.where(less == 0.0, grown, small))
