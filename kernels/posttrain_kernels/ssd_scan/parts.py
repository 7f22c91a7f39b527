"""What the Triton kernels of the scan share: loads and stores of a chunk, and its decays, right in fp32 at any size.

Legend: L tokens of a chunk, t reads and u writes; H heads, P head width, N state width; a line is a row's head. States
are [P, N] in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

LENGTHS = ["T", "chunks", "length", "segments", "parts", "span"]
"""Arguments that kernels are not compiled for: another length of rows is no reason to compile."""


@triton.jit
def load_tile(p_base, start, stride, left, L: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr):
    """[L, WIDTH] from token `start` on, zero from its token `left` on."""
    # 64 bits for the chunk, 32 within it: a long row of a packed projection passes 2^31 elements.
    at = tl.arange(0, L)
    b_tile = tl.load(
        p_base + start * stride + at[:, None] * stride + tl.arange(0, WIDTH)[None, :],
        mask=(at < left)[:, None],
        other=0.0,
    )
    return b_tile.to(TYPE)


@triton.jit
def store_tile(p_base, start, stride, left, b_tile, L: tl.constexpr, WIDTH: tl.constexpr):
    """[L, WIDTH] to token `start` on, up to its token `left`."""
    at = tl.arange(0, L)
    p_tile = p_base + start * stride + at[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=(at < left)[:, None])


@triton.jit
def load_decays(p_dt, p_high, p_low, p_leave, p_resets, start, L: tl.constexpr, PACKED: tl.constexpr):
    """What `sum_decays_kernel` wrote of the chunk at token `start`: dt, high, low, resets, enter and leave, [L] each.

    `enter` is the decay from the state before the chunk to t. Loads of so few numbers are repeated in every layout that
    wants them; what a program sums up itself would go through shared memory to each.
    """
    at = start + tl.arange(0, L)
    high = tl.load(p_high + at)
    enter = tl.exp2(high)
    resets = tl.zeros([L], tl.int32)
    if PACKED:
        resets = tl.load(p_resets + at)
        enter = tl.where(resets == 0, enter, 0.0)
    return tl.load(p_dt + at), high, tl.load(p_low + at), resets, enter, tl.load(p_leave + at)


@triton.jit
def pair_decays(b_mix, high, low, resets, L: tl.constexpr, PACKED: tl.constexpr, WRITERS: tl.constexpr):
    """[t, u], or [u, t] if WRITERS: the decay from u to t where u ≤ t in one document, else 0.

    Exponents of other pairs are never taken. `b_mix` is a product of that shape that decays will be multiplied with:
    they are computed in its registers' layout because the mask asks it something; by themselves they would go through
    shared memory to it.
    """
    at = tl.arange(0, L)
    if WRITERS:
        ordered = at[None, :] >= at[:, None]
        exponent = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
    else:
        ordered = at[:, None] >= at[None, :]
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    mixed = ordered & (b_mix == b_mix)
    if PACKED:
        mixed = mixed & (resets[:, None] == resets[None, :])
    return tl.exp2(tl.where(mixed, exponent, float("-inf")))


@triton.jit
def advance(b_state, whole, b_values, b_keys, weight, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """whole · state + valuesᵀ (weight ∘ keys): a state [·, ·] after a chunk of values and keys, [L, ·] each."""
    b_keys = (b_keys.to(tl.float32) * weight[:, None]).to(TYPE)
    return tl.dot(tl.trans(b_values), b_keys, acc=b_state * whole, input_precision=PRECISION)
