"""Backward kernels of the scan in Triton: a program carries the gradient of one head's state back through its chunks.

With S = C Bᵀ, Q = dY Xᵀ, D the decays from u to t [t, u], h the state before the chunk and g the gradient of the state
after it, [N, P],

    dC = (Q ∘ D ∘ dt) B + enter ∘ (dY hᵀ)              dBᵀ = Cᵀ (Q ∘ D ∘ dt) + (g Xᵀ) ∘ leave ∘ dt
    dX = dt ∘ W + d dY,   Wᵀ = dYᵀ (S ∘ D) + (leave ∘ B g)ᵀ
    g' = whole · g + Cᵀ (enter ∘ dY)

An exponent dt_t a is in all that crosses from before t to t or later, and its gradient is the sum of that:

    e_t = Σ_{u<t≤t'} M_{t'u} dt_u + Σ_{t'≥t} c_t'·(enter dY hᵀ)_t' + Σ_{u<t} dt_u x_u·(leave B g)_u + whole ⟨g, h⟩

with M = S ∘ Q ∘ D; ddt = a e + x·W, da = Σ dt e. The first sum is a product with ones where t ≤ t'.
Shorter forms, suffix sums of (what t reads − what it writes) over a chunk, or of c·dc − b·db over a row as in gated
linear attention, lose an e that is small beside what goes on on either side of a strong decay.

No product has a transposed, rounded accumulator as operand: Triton miscompiles some on Hopper (fla issue 640).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import decays, load_steps, load_tile, pair_decays, state_offsets, store_tile


@triton.jit
def chunk_grad_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_d, p_doc, p_states, p_dy, p_last,
    p_dx, p_ddt, p_db, p_dc, p_first, p_da, p_dd,
    x_row, x_token, x_head, dt_row, dt_token, dt_head, b_row, b_token, b_head, c_row, c_token, c_head,
    dy_row, dy_token, dy_head, T, segment, segments,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr,
    HAS_D: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of a head over one segment of a row; those of shared heads are summed by the caller.

    Args:
        p_states: the state before each chunk of L tokens, [B, H, chunks, N, P].
        p_last: gradients of the states after the segments, if LAST, else zero.
        p_dx, p_db, p_dc: [B, T, H, P or N]; p_ddt: [B, T, H]; p_da and p_dd: [B, H, segments].
        p_first: gradient of the state before the row, if FIRST.
    """
    line = tl.program_id(0)
    row = (line // H).to(tl.int64)
    head = line % H
    part = tl.program_id(1)
    p_x += row * x_row + (head // X_SHARE) * x_head
    p_dt += row * dt_row + head * dt_head
    p_b += row * b_row + (head // B_SHARE) * b_head
    p_c += row * c_row + (head // C_SHARE) * c_head
    p_dy += row * dy_row + head * dy_head
    p_doc += row * T
    place = row * T * H + head
    p_dx += place * P
    p_db += place * N
    p_dc += place * N
    p_ddt += place
    a = tl.load(p_a + head).to(tl.float32)
    d = tl.load(p_d + head).to(tl.float32) if HAS_D else 0.0
    chunks = tl.cdiv(T, L)
    index = line.to(tl.int64) * segments + part
    at = tl.arange(0, L)
    b_onward = (at[:, None] <= at[None, :]).to(TYPE)
    in_state = tl.arange(0, N)[:, None] * P + tl.arange(0, P)[None, :]

    b_g = tl.zeros([N, P], tl.float32)
    if LAST:
        b_g += tl.load(p_last + state_offsets(index, P, 0, N, P)).to(tl.float32)
    da = 0.0
    dd = 0.0
    begin = part.to(tl.int64) * segment
    count = tl.cdiv(tl.minimum(segment, T - begin), L).to(tl.int32)
    for i in range(count):
        start = begin + (count - 1 - i) * L
        left = (T - start).to(tl.int32)
        b_x = load_tile(p_x, start, x_token, left, L, P, TYPE)
        b_b = load_tile(p_b, start, b_token, left, L, N, TYPE)
        b_c = load_tile(p_c, start, c_token, left, L, N, TYPE)
        b_dy = load_tile(p_dy, start, dy_token, left, L, P, TYPE)
        b_h = tl.load(p_states + (line.to(tl.int64) * chunks + start // L) * (N * P) + in_state)
        b_dt = load_steps(p_dt, start, dt_token, left, L)
        high, low, run, enter, leave, whole = decays(b_dt, a, p_doc, start, left, L, PACKED)
        b_low = b_g.to(TYPE)
        through = whole * tl.sum(b_g * b_h.to(tl.float32))
        # Early, so that registers of b_dy are free for the rest, which takes the gradient before as b_low.
        b_dyd = (b_dy.to(tl.float32) * enter[:, None]).to(TYPE)
        b_g = tl.dot(tl.trans(b_c), b_dyd, acc=b_g * whole, input_precision=PRECISION)

        b_s = tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
        b_q = tl.dot(b_dy, tl.trans(b_x), input_precision=PRECISION)
        b_decay = pair_decays(b_s, high, low, run, L, PACKED)
        b_sd = b_s * b_decay
        b_m = (b_sd * b_q * b_dt[None, :]).to(TYPE)
        b_across = tl.dot(b_onward, b_m, input_precision=PRECISION)
        b_across = tl.sum(tl.where(at[:, None] > at[None, :], b_across, 0.0), axis=1)
        own = at[:, None] == at[None, :]
        dd += tl.sum(tl.where(own, b_q, 0.0))
        b_qd = (b_q * b_decay * b_dt[None, :]).to(TYPE)
        b_sd = b_sd.to(TYPE)

        b_dc = tl.dot(b_dy, tl.trans(b_h), input_precision=PRECISION) * enter[:, None]
        b_entering = tl.sum(b_dc * b_c.to(tl.float32), axis=1)
        b_dc = tl.dot(b_qd, b_b, acc=b_dc, input_precision=PRECISION)
        store_tile(p_dc, start, H * N, left, b_dc, L, N)

        b_dbt = tl.dot(b_low, tl.trans(b_x), input_precision=PRECISION) * (leave * b_dt)[None, :]
        b_dbt = tl.dot(tl.trans(b_c), b_qd, acc=b_dbt, input_precision=PRECISION)
        store_tile(p_db, start, H * N, left, tl.trans(b_dbt), L, N)

        b_w = tl.dot(b_b, b_low, input_precision=PRECISION) * leave[:, None]
        b_leaving = tl.sum(b_w * b_x.to(tl.float32), axis=1)
        b_w += tl.trans(tl.dot(tl.trans(b_dy), b_sd, input_precision=PRECISION))
        b_direct = tl.sum(b_w * b_x.to(tl.float32), axis=1)
        store_tile(p_dx, start, H * P, left, b_w * b_dt[:, None] + d * b_dy.to(tl.float32), L, P)

        # fp64 (L numbers): sums up to t less the summand at t, beside strong decays much the largest.
        b_driven = (b_leaving * b_dt).to(tl.float64)
        b_arrived = (tl.cumsum(b_driven, axis=0) - b_driven).to(tl.float32)
        b_e = b_across + tl.cumsum(b_entering, axis=0, reverse=True) + b_arrived + through
        b_ddt = a * b_e + b_direct
        tl.store(p_ddt + (start + at) * H, b_ddt.to(p_ddt.dtype.element_ty), mask=at < left)
        da += tl.sum(b_dt * b_e)
    tl.store(p_da + index, da)
    tl.store(p_dd + index, dd)
    if FIRST:
        if part == 0:
            tl.store(p_first + state_offsets(line.to(tl.int64), P, 0, N, P), b_g)


@triton.jit
def segment_grad_kernel(
    p_dt, p_a, p_c, p_doc, p_dy, p_local, p_decay,
    dt_row, dt_token, dt_head, c_row, c_token, c_head, dy_row, dy_token, dy_head, T, segment, segments,
    H: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the state before each segment if none comes from behind it, and the segment's product of decays."""
    blocks: tl.constexpr = P // BLOCK_P
    line = tl.program_id(0) // blocks
    row = (line // H).to(tl.int64)
    head = line % H
    first_column = (tl.program_id(0) % blocks) * BLOCK_P
    part = tl.program_id(1)
    p_dt += row * dt_row + head * dt_head
    p_c += row * c_row + (head // C_SHARE) * c_head
    p_dy += row * dy_row + head * dy_head + first_column
    p_doc += row * T
    a = tl.load(p_a + head).to(tl.float32)
    index = line.to(tl.int64) * segments + part

    b_g = tl.zeros([N, BLOCK_P], tl.float32)
    decay = 1.0
    begin = part.to(tl.int64) * segment
    count = tl.cdiv(tl.minimum(segment, T - begin), L).to(tl.int32)
    for i in range(count):
        start = begin + (count - 1 - i) * L
        left = (T - start).to(tl.int32)
        b_c = load_tile(p_c, start, c_token, left, L, N, TYPE)
        b_dy = load_tile(p_dy, start, dy_token, left, L, BLOCK_P, TYPE)
        b_dt = load_steps(p_dt, start, dt_token, left, L)
        high, low, run, enter, leave, whole = decays(b_dt, a, p_doc, start, left, L, PACKED)
        b_dyd = (b_dy.to(tl.float32) * enter[:, None]).to(TYPE)
        b_g = tl.dot(tl.trans(b_c), b_dyd, acc=b_g * whole, input_precision=PRECISION)
        decay *= whole
    tl.store(p_local + state_offsets(index, P, first_column, N, BLOCK_P), b_g)
    tl.store(p_decay + index, decay)
