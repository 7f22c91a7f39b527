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
def load_tile(
    source, line, column, start, stride: tl.constexpr, left,
    L: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[L, WIDTH] from token `start` on, zero from its token `left` on.

    `source` is where the row's head begins; if TMA, when no tile is ragged, the copy engine's matrix of all tokens, in
    which the row begins at `line` and the head at `column`.
    """
    if TMA:
        b_tile = source.load([line + start.to(tl.int32), column])
    else:
        # 64 bits for the chunk, 32 within it: a long row of a packed projection passes 2^31 elements.
        at = tl.arange(0, L)
        b_tile = tl.load(
            source + start * stride + at[:, None] * stride + tl.arange(0, WIDTH)[None, :],
            mask=(at < left)[:, None],
            other=0.0,
        )
    return b_tile.to(TYPE)


@triton.jit
def store_tile(
    target, line, column, start, stride: tl.constexpr, left, b_tile,
    L: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[L, WIDTH] to token `start` on, up to its token `left`; `target` is as the source of `load_tile`."""
    if TMA:
        target.store([line + start.to(tl.int32), column], b_tile.to(target.dtype))
    else:
        at = tl.arange(0, L)
        p_tile = target + start * stride + at[:, None] * stride + tl.arange(0, WIDTH)[None, :]
        tl.store(p_tile, b_tile.to(target.dtype.element_ty), mask=(at < left)[:, None])


@triton.jit
def load_decays(p_decays, p_resets, chunk, L: tl.constexpr, PACKED: tl.constexpr):
    """What `sum_decays_kernel` wrote of a chunk of a row's head: dt, high, low, resets, enter and leave, [L] each.

    `enter` is the decay from the state before the chunk to t. Loads of so few numbers are repeated in every layout that
    wants them; what a program sums up itself would go through shared memory to each.
    """
    at = tl.arange(0, L)
    p_decays += chunk.to(tl.int64) * (4 * L)
    high = tl.load(p_decays + (L + at))
    enter = tl.exp2(high)
    resets = tl.zeros([L], tl.int32)
    if PACKED:
        resets = tl.load(p_resets + chunk.to(tl.int64) * L + at)
        enter = tl.where(resets == 0, enter, 0.0)
    low = tl.load(p_decays + (2 * L + at))
    return tl.load(p_decays + at), high, low, resets, enter, tl.load(p_decays + (3 * L + at))


@triton.jit
def load_whole(p_decays, p_resets, chunk, L: tl.constexpr, PACKED: tl.constexpr):
    """The decay of a state over a chunk: `enter` of its last token."""
    chunk = chunk.to(tl.int64)
    whole = tl.exp2(tl.load(p_decays + chunk * (4 * L) + 2 * L - 1))
    if PACKED:
        whole = tl.where(tl.load(p_resets + chunk * L + L - 1) == 0, whole, 0.0)
    return whole


@triton.jit
def pair_decays(
    high, low, resets, L: tl.constexpr, PACKED: tl.constexpr, WRITERS: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    """[t, u], or [u, t] if WRITERS: the decay from u to t where u ≤ t in one document, else 0.

    Exponents of other pairs are never taken. For products of bf16 the upper halves alone do: they are off by less than
    the products' rounding while the exponents of a chunk sum up to less than 2^15.
    """
    at = tl.arange(0, L)
    if WRITERS:
        mixed = at[None, :] >= at[:, None]
        exponent = high[None, :] - high[:, None]
        if TYPE != tl.bfloat16:
            exponent += low[None, :] - low[:, None]
    else:
        mixed = at[:, None] >= at[None, :]
        exponent = high[:, None] - high[None, :]
        if TYPE != tl.bfloat16:
            exponent += low[:, None] - low[None, :]
    if PACKED:
        mixed = mixed & (resets[:, None] == resets[None, :])
    return tl.exp2(tl.where(mixed, exponent, float("-inf")))


@triton.jit
def advance(b_state, whole, b_values, b_keys, weight, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """whole · state + valuesᵀ (weight ∘ keys): a state [·, ·] after a chunk of values and keys, [L, ·] each."""
    b_keys = (b_keys.to(tl.float32) * weight[:, None]).to(TYPE)
    return tl.dot(tl.trans(b_values), b_keys, acc=b_state * whole, input_precision=PRECISION)
