"""What the scan's kernels start from, in Triton: decays of all chunks, states between chunks, states between segments.

States h go forward, gradients g of states go back, and both are one recurrence of values and keys:

    h' = whole · h + Xᵀ (leave ∘ dt ∘ B)              g = whole · g' + dYᵀ (enter ∘ C)              [P, N]
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LENGTHS, advance, load_decays, load_tile, load_whole

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=LENGTHS)
def sum_decays_kernel(
    p_dt, p_a, p_doc, p_decays, p_resets,
    dt_row, dt_token, dt_head, T, chunks,
    H: tl.constexpr, L: tl.constexpr, BLOCK_H: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The decays of one chunk of BLOCK_H heads, no exponent above 0; once, so that no chain of chunks has to.

    Args:
        p_decays: [B, H, chunks, 4, L] in fp32. dt; 0, a token that is not there, past the end. Then high and low, of
            which high + low = Σ_{i≤t} dt_i a log2 e within the chunk. Summed in fp64 and split, since a decay between
            neighbours is a short difference of long sums: (high_t − high_u) + (low_t − low_u) keeps it. Then leave, the
            decay from u to the chunk's end. Side by side, so that one address serves all.
        p_resets: [B, chunks · L], resets so far in the chunk, if PACKED. Pairs of other counts are not mixed.
    """
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    start = chunk.to(tl.int64) * L
    left = (T - start).to(tl.int32)
    at = tl.arange(0, L)
    there = head < H
    p_tile = p_dt + row * dt_row + start * dt_token + at[:, None] * dt_token + head[None, :] * dt_head
    b_dt = tl.load(p_tile, mask=(at < left)[:, None] & there[None, :], other=0.0).to(tl.float32)
    a = tl.load(p_a + head, mask=there, other=0.0).to(tl.float32)
    b_step = (b_dt * a[None, :]).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_step, axis=0)
    total = tl.sum(b_step, axis=0)
    high = b_sum.to(tl.float32)
    low = (b_sum - high.to(tl.float64)).to(tl.float32)
    leave = tl.exp2((total[None, :] - b_sum).to(tl.float32))
    if PACKED:
        p_doc += row * T + start
        inner = (at < left) & (at + start > 0)
        here = tl.load(p_doc + at, mask=inner, other=0)
        before = tl.load(p_doc + at - 1, mask=inner, other=0)
        reset = (inner & (here != before)).to(tl.int32)
        resets = tl.cumsum(reset, axis=0)
        last = tl.sum(reset, axis=0)
        leave = tl.where((resets == last)[:, None], leave, 0.0)
        if tl.program_id(1) == 0:
            tl.store(p_resets + row * chunks * L + start + at, resets)
    line = row * H + head
    to = ((line * chunks + chunk) * (4 * L))[None, :] + at[:, None]
    tl.store(p_decays + to, b_dt, mask=there[None, :])
    tl.store(p_decays + to + L, high, mask=there[None, :])
    tl.store(p_decays + to + 2 * L, low, mask=there[None, :])
    tl.store(p_decays + to + 3 * L, leave, mask=there[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def chain_states_kernel(
    p_x, p_b, p_c, p_dy, p_decays, p_resets,
    p_first, p_last, p_h, p_g, p_end, p_decay,
    x_row, x_head, b_row, b_head, c_row, c_head, dy_row, dy_head, T, chunks, length, segments, span,
    x_token: tl.constexpr, b_token: tl.constexpr, c_token: tl.constexpr, dy_token: tl.constexpr,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_P rows of the states of a head, h forward or g back through one segment; both ways side by side if asked.

    Args:
        p_first: h before the segments, if FIRST; p_last: g after them, if LAST; else zero.
        p_h: h before each `span` chunks, [B, H, spans, P, N], and p_g: g after each chunk, unless LOCAL.
        p_end: g before the row; if LOCAL what each segment comes to, and its product of decays to p_decay.
        length: chunks of a segment, a multiple of `span`.
    """
    blocks: tl.constexpr = P // BLOCK_P
    line = (tl.program_id(0) // blocks).to(tl.int64)
    row = line // H
    head = line % H  # 64 bits: where heads lie before tokens, its address passes 2^31
    first_p = (tl.program_id(0) % blocks) * BLOCK_P
    p_decays += line * chunks * (4 * L)
    p_resets += row * chunks * L
    if FORWARD:
        if not BACKWARD or tl.program_id(2) == 0:
            _chain(
                p_x + row * x_row + (head // X_SHARE) * x_head + first_p,
                p_b + row * b_row + (head // B_SHARE) * b_head,
                p_decays, p_resets, p_first, p_h, p_end, p_decay,
                x_token, b_token, line, first_p, T, chunks, length, segments, span,
                P, N, L, BLOCK_P, False, FIRST, LOCAL, PACKED, TYPE, PRECISION,
            )  # fmt: skip
    if BACKWARD:
        if not FORWARD or tl.program_id(2) == 1:
            _chain(
                p_dy + row * dy_row + head * dy_head + first_p,
                p_c + row * c_row + (head // C_SHARE) * c_head,
                p_decays, p_resets, p_last, p_g, p_end, p_decay,
                dy_token, c_token, line, first_p, T, chunks, length, segments, 1,
                P, N, L, BLOCK_P, True, LAST, LOCAL, PACKED, TYPE, PRECISION,
            )  # fmt: skip


@triton.jit
def _chain(
    p_values, p_keys, p_decays, p_resets, p_given, p_states, p_end, p_decay,
    values_token: tl.constexpr, keys_token: tl.constexpr, line, first_p, T, chunks, length, segments, span,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    REVERSE: tl.constexpr, GIVEN: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One way of `chain_states_kernel`."""
    part = tl.program_id(1)
    index = line * segments + part
    tile = (first_p + tl.arange(0, BLOCK_P))[:, None] * N + tl.arange(0, N)[None, :]
    b_state = tl.zeros([BLOCK_P, N], tl.float32)
    if GIVEN:
        b_state += tl.load(p_given + index * (P * N) + tile).to(tl.float32)
    decay = 1.0
    begin = part * length
    count = tl.minimum(length, chunks - begin)
    for i in range(count):
        chunk = begin + (count - 1 - i if REVERSE else i)
        start = chunk.to(tl.int64) * L
        left = (T - start).to(tl.int32)
        whole = load_whole(p_decays, p_resets, chunk, L, PACKED)
        b_values = load_tile(p_values, 0, 0, start, values_token, left, L, BLOCK_P, TYPE, False)
        b_keys = load_tile(p_keys, 0, 0, start, keys_token, left, L, N, TYPE, False)
        dt, _, _, _, enter, leave = load_decays(p_decays, p_resets, chunk, L, PACKED)
        if not LOCAL:
            if chunk % span == 0:
                p_state = p_states + (line * tl.cdiv(chunks, span) + chunk // span) * (P * N) + tile
                tl.store(p_state, b_state.to(p_states.dtype.element_ty))
        b_state = advance(b_state, whole, b_values, b_keys, enter if REVERSE else leave * dt, TYPE, PRECISION)
        decay *= whole
    if LOCAL:
        tl.store(p_end + index * (P * N) + tile, b_state)
        tl.store(p_decay + index, decay)
    elif REVERSE:
        if part == 0:
            tl.store(p_end + line * (P * N) + tile, b_state)


@triton.jit
def pass_states_kernel(
    p_local, p_decay, p_given, p_out, size, segments, REVERSE: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """States that segments begin with, from what each gives by itself: out_s = decay · out_{s−1} + local_{s−1}.

    Gradients go the other way (REVERSE): out_s is what a segment gets at its end. `p_given` is where it starts, if
    GIVEN, else zero. All [lines, segments, size] but given, [lines, size].
    """
    line = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = at < size
    b_state = tl.zeros([BLOCK], tl.float32)
    if GIVEN:
        b_state += tl.load(p_given + line * size + at, mask=valid, other=0.0).to(tl.float32)
    for i in range(segments):
        index = line * segments + (segments - 1 - i if REVERSE else i)
        tl.store(p_out + index * size + at, b_state, mask=valid)
        b_local = tl.load(p_local + index * size + at, mask=valid, other=0.0)
        b_state = b_state * tl.load(p_decay + index) + b_local
