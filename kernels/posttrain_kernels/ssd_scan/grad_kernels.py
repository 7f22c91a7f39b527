"""Backward kernel of the scan in Triton: a program carries the state of one head through the chunks of a run of tokens.

With S = B Cᵀ, Q = X dYᵀ, D the decays from u to t, all [u, t], h the state before the chunk and g the gradient of the
state after it, [P, N],

    dB = dt ∘ ((Q ∘ D) C + leave ∘ (X g))                 dC = (Bᵀ (dt ∘ Q ∘ D))ᵀ + enter ∘ (dY h)
    dX = dt ∘ W + d dY,   W = (S ∘ D) dY + leave ∘ (B gᵀ)

An exponent dt_t a is in all that crosses from before t to t or later, and its gradient is the sum of that:

    e_t = Σ_{t'≥t} (R_tt' + c_t'·(enter dY h)_t') + Σ_{u<t} dt_u x_u·(leave B gᵀ)_u + whole ⟨g, h⟩

with R_tt' = Σ_{u<t} dt_u (S ∘ Q ∘ D)_ut', a product with ones where u < t; ddt = a e + x·W, da = Σ dt e.
Shorter forms, suffix sums of (what t reads − what it writes) over a chunk, or of c·dc − b·db over a row as in gated
linear attention, lose an e that is small beside what goes on on either side of a strong decay.

[u, t] is the order in which most sums are along rows, within a warp. h is wanted in one order alone and stays in
registers; g is wanted in both and comes from memory: no product has a transposed, rounded accumulator as operand, since
Triton miscompiles some on Hopper (fla issue 640).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LENGTHS, advance, load_decays, load_tile, load_whole, pair_decays, store_tile


@triton.jit(do_not_specialize=LENGTHS)
def chunk_grad_kernel(
    p_x, p_b, p_c, p_dy, p_a, p_d, p_decays, p_resets, p_first, p_g,
    p_dx, p_ddt, p_db, p_dc, p_da, p_dd,
    x_row, x_head, b_row, b_head, c_row, c_head, dy_row, dy_head, T, chunks, length, parts,
    x_token: tl.constexpr, b_token: tl.constexpr, c_token: tl.constexpr, dy_token: tl.constexpr,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, FIRST: tl.constexpr,
    HAS_D: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, TMA_OUT: tl.constexpr,
):  # fmt: skip
    """All gradients of a head over one run of tokens; those of shared heads are summed by the caller.

    Args:
        p_x, p_b, p_c, p_dy, p_g: if TMA, descriptors (see `load_tile`), of p_g as one matrix of N columns.
        p_first: states before the runs, [B, H, parts, P, N], if FIRST, else zero.
        p_g: gradients of the states after each chunk, [B, H, chunks, P, N].
        p_dx, p_db, p_dc: [B, T, H, P or N], if TMA_OUT descriptors; p_ddt: [B, T, H]; p_da and p_dd: [B, H, parts].
        length: chunks of a run; parts: runs of a row.
    """
    line = tl.program_id(0).to(tl.int64)
    row = line // H
    head = line % H  # 64 bits: where heads lie before tokens, its address passes 2^31
    part = tl.program_id(1)
    x_at, b_at, c_at = (head // X_SHARE) * x_head, (head // B_SHARE) * b_head, (head // C_SHARE) * c_head
    dy_at = head * dy_head
    place = row * T * H + head
    if not TMA:
        p_x += row * x_row + x_at
        p_b += row * b_row + b_at
        p_c += row * c_row + c_at
        p_dy += row * dy_row + dy_at
    if not TMA_OUT:
        p_dx += place * P
        p_db += place * N
        p_dc += place * N
    p_decays += line * chunks * (4 * L)
    p_resets += row * chunks * L
    p_ddt += place
    # Coordinates of the copy engine.
    token, column = row.to(tl.int32) * T, head.to(tl.int32)
    x_at, b_at, c_at, dy_at = x_at.to(tl.int32), b_at.to(tl.int32), c_at.to(tl.int32), dy_at.to(tl.int32)
    a = tl.load(p_a + head).to(tl.float32)
    d = tl.load(p_d + head).to(tl.float32) if HAS_D else 0.0
    at = tl.arange(0, L)
    tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]

    b_h = tl.zeros([P, N], tl.float32)
    if FIRST:
        b_h += tl.load(p_first + (line * parts + part) * (P * N) + tile).to(tl.float32)
    da = tl.zeros([L], tl.float32)
    dd = tl.zeros([L], tl.float32)
    b_earlier = tl.where(at[None, :] < at[:, None], 1.0, 0.0).to(TYPE)  # [t, u], in shared memory from here on
    begin = part * length
    # Statements in an order, found by a search, in which nothing is spilled (sm_90, P = N = L = 64, neither PACKED nor
    # FIRST). Addresses and descriptors of all tiles, kept over the loop, would take more registers than there are.
    for i in tl.range(0, tl.minimum(length, chunks - begin), disable_licm=True):
        chunk = line * chunks + begin + i
        start = (begin + i).to(tl.int64) * L
        left = (T - start).to(tl.int32)
        whole = load_whole(p_decays, p_resets, begin + i, L, PACKED)
        if TMA:
            b_g = p_g.load([chunk.to(tl.int32) * P, 0])
        else:
            b_g = tl.load(p_g + chunk * (P * N) + tile)
        b_x = load_tile(p_x, token, x_at, start, x_token, left, L, P, TYPE, TMA)
        dt, high, low, resets, enter, leave = load_decays(p_decays, p_resets, begin + i, L, PACKED)
        b_b = load_tile(p_b, token, b_at, start, b_token, left, L, N, TYPE, TMA)
        b_w = tl.dot(b_b, tl.trans(b_g), input_precision=PRECISION)
        leaving = leave * tl.sum(b_w * b_x.to(tl.float32), axis=1)
        b_before = b_h.to(TYPE)
        b_dy = load_tile(p_dy, token, dy_at, start, dy_token, left, L, P, TYPE, TMA)
        b_c = load_tile(p_c, token, c_at, start, c_token, left, L, N, TYPE, TMA)
        # whole ⟨g, h⟩, which every e_t has: in parts, one for each t', since a sum over all warps costs more barriers.
        if P == L:
            through = whole * tl.sum(b_g.to(tl.float32) * b_h, axis=1)
        else:
            through = tl.zeros([L], tl.float32) + whole * tl.sum(b_g.to(tl.float32) * b_h) / L
        b_h = advance(b_h, whole, b_x, b_b, leave * dt, TYPE, PRECISION)

        b_decay = pair_decays(high, low, resets, L, PACKED, True, TYPE)
        b_s = tl.dot(b_b, tl.trans(b_c), input_precision=PRECISION)
        b_s *= b_decay
        b_q = tl.dot(b_x, tl.trans(b_dy), input_precision=PRECISION)
        b_w = b_w * (leave * dt)[:, None] + d * b_dy.to(tl.float32)
        direct = leaving + tl.sum(b_s * b_q, axis=1)
        b_s *= dt[:, None]
        b_m = (b_s * b_q).to(TYPE)
        b_w = tl.dot(b_s.to(TYPE), b_dy, acc=b_w, input_precision=PRECISION)
        if HAS_D:
            dd += tl.sum(tl.where(at[:, None] == at[None, :], b_q, 0.0), axis=1)
        b_q = (b_q * b_decay * dt[:, None]).to(TYPE)
        b_db = tl.dot(b_x, b_g, input_precision=PRECISION) * (leave * dt)[:, None]
        store_tile(p_dx, token, column * P, start, H * P, left, b_w, L, P, TMA_OUT)
        b_dc = tl.dot(b_dy, b_before, input_precision=PRECISION)
        b_db = tl.dot(b_q, b_c, acc=b_db, input_precision=PRECISION)
        store_tile(p_db, token, column * N, start, H * N, left, b_db, L, N, TMA_OUT)
        # Rounded before it goes through shared memory: half of the bytes.
        b_part = tl.dot(tl.trans(b_b), b_q, input_precision=PRECISION).to(TYPE)
        entering = enter * tl.sum(b_dc * b_c.to(tl.float32), axis=1)

        # Always so, but Triton puts a branch behind the loads of the next chunk, which are on their way during this;
        # else they would come last, each waited for at once. dc leaves at the end: by then db has left its buffer.
        if left > 0:
            b_dc = b_dc * enter[:, None] + tl.trans(b_part).to(tl.float32)
            b_across = tl.dot(b_earlier, b_m, input_precision=PRECISION) + (entering + through)[None, :]  # [t, t']
            e = tl.sum(tl.where(at[None, :] >= at[:, None], b_across, (leaving * dt + through)[None, :]), axis=1)
            da += dt * e
            p_at = p_ddt + (start + at) * H
            tl.store(p_at, (a * e + direct).to(p_ddt.dtype.element_ty), mask=None if TMA else at < left)
            store_tile(p_dc, token, column * N, start, H * N, left, b_dc, L, N, TMA_OUT)
    tl.store(p_da + line * parts + part, tl.sum(da))
    tl.store(p_dd + line * parts + part, tl.sum(dd))
