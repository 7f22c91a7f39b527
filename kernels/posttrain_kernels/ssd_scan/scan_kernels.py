"""Forward kernels of the scan in Triton: a program carries the state of one head through the chunks of a segment.

One segment (the whole row) reads x, b and c once and is the fastest where rows and heads fill the card. Where they do
not, a row is cut into segments: `chunk_scan_kernel` without outputs takes each segment's state from zero,
`pass_states_kernel` joins them, and `chunk_scan_kernel` again, from the right states, gives the outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import decays, load_steps, load_tile, pair_decays, state_offsets, store_tile


@triton.jit
def chunk_scan_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_d, p_doc, p_first, p_y, p_states, p_end, p_decay,
    x_row, x_token, x_head, dt_row, dt_token, dt_head, b_row, b_token, b_head, c_row, c_token, c_head,
    T, segment, segments,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, L: tl.constexpr, BLOCK_P: tl.constexpr,
    OUTPUT: tl.constexpr, STATES: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr, LOCAL: tl.constexpr,
    HAS_D: tl.constexpr, PACKED: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs, chunk states or the last state of BLOCK_P of P columns of a head, over one segment of a row.

    Args:
        p_first: states before the segments, if FIRST, else zero; p_y: [B, T, H, P], if OUTPUT.
        p_states: the state before each chunk, [B, H, chunks, N, P], if STATES.
        p_end: the state after the last segment, if END; if LOCAL after each, and its product of decays to p_decay.
        segment: tokens, a multiple of L.
    """
    blocks: tl.constexpr = P // BLOCK_P
    line = tl.program_id(0) // blocks
    row = (line // H).to(tl.int64)
    head = line % H
    first_column = (tl.program_id(0) % blocks) * BLOCK_P
    part = tl.program_id(1)
    p_x += row * x_row + (head // X_SHARE) * x_head + first_column
    p_dt += row * dt_row + head * dt_head
    p_b += row * b_row + (head // B_SHARE) * b_head
    p_c += row * c_row + (head // C_SHARE) * c_head
    p_doc += row * T
    p_y += (row * T * H + head) * P + first_column
    a = tl.load(p_a + head).to(tl.float32)
    d = tl.load(p_d + head).to(tl.float32) if HAS_D else 0.0
    chunks = tl.cdiv(T, L)
    index = line.to(tl.int64) * segments + part
    offsets = state_offsets(index, P, first_column, N, BLOCK_P)

    b_state = tl.zeros([N, BLOCK_P], tl.float32)
    if FIRST:
        b_state += tl.load(p_first + offsets).to(tl.float32)
    decay = 1.0
    begin = part.to(tl.int64) * segment
    for i in range(tl.cdiv(tl.minimum(segment, T - begin), L).to(tl.int32)):
        start = begin + i * L
        left = (T - start).to(tl.int32)
        b_x = load_tile(p_x, start, x_token, left, L, BLOCK_P, TYPE)
        b_b = load_tile(p_b, start, b_token, left, L, N, TYPE)
        b_dt = load_steps(p_dt, start, dt_token, left, L)
        high, low, run, enter, leave, whole = decays(b_dt, a, p_doc, start, left, L, PACKED)
        if STATES:
            at = tl.arange(0, N)[:, None] * P + first_column + tl.arange(0, BLOCK_P)[None, :]
            p_state = p_states + (line.to(tl.int64) * chunks + start // L) * (N * P) + at
            tl.store(p_state, b_state.to(p_states.dtype.element_ty))
        if OUTPUT:
            b_c = load_tile(p_c, start, c_token, left, L, N, TYPE)
            b_y = tl.dot(b_c, b_state.to(TYPE), input_precision=PRECISION) * enter[:, None]
            b_mix = tl.dot(b_c, tl.trans(b_b), input_precision=PRECISION)
            b_mix *= pair_decays(b_mix, high, low, run, L, PACKED) * b_dt[None, :]
            b_y = tl.dot(b_mix.to(TYPE), b_x, acc=b_y, input_precision=PRECISION)
            if HAS_D:
                b_y += d * b_x.to(tl.float32)
            store_tile(p_y, start, H * P, left, b_y, L, BLOCK_P)
        b_drive = (b_x.to(tl.float32) * (leave * b_dt)[:, None]).to(TYPE)
        b_state = tl.dot(tl.trans(b_b), b_drive, acc=b_state * whole, input_precision=PRECISION)
        decay *= whole
    if LOCAL:
        tl.store(p_end + offsets, b_state)
        tl.store(p_decay + index, decay)
    if END:
        if part == segments - 1:
            tl.store(p_end + state_offsets(line.to(tl.int64), P, first_column, N, BLOCK_P), b_state)


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


@triton.jit
def step_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_d, p_state, p_y,
    x_row, x_head, dt_row, dt_head, b_row, b_head, c_row, c_head, state_row, state_head, state_p,
    H: tl.constexpr, X_SHARE: tl.constexpr, B_SHARE: tl.constexpr, C_SHARE: tl.constexpr,
    P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """One token: BLOCK_P rows of a head's state [P, N] are read and written once, and give as many outputs."""
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    at_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    at_n = tl.arange(0, BLOCK_N)
    in_p, in_n = at_p < P, at_n < N
    b_x = tl.load(p_x + row * x_row + (head // X_SHARE) * x_head + at_p, mask=in_p, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + row * b_row + (head // B_SHARE) * b_head + at_n, mask=in_n, other=0.0).to(tl.float32)
    b_c = tl.load(p_c + row * c_row + (head // C_SHARE) * c_head + at_n, mask=in_n, other=0.0).to(tl.float32)
    dt = tl.load(p_dt + row * dt_row + head * dt_head).to(tl.float32)
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
