"""What the Triton kernels of the scan share: loads of a chunk, and its decays, right in fp32 whatever their sizes.

Legend: L tokens of a chunk, t reads and u writes; H heads, P head width, N state width. States are [N, P] in registers,
[P, N] in memory (chunk states, which only kernels read, [N, P]).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


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
def state_offsets(index, P, first, N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets [N, BLOCK_P] of state number `index` (64 bits) among states [P, N], columns P from `first` on."""
    at_p = first + tl.arange(0, BLOCK_P)
    return index * (P * N) + at_p[None, :] * N + tl.arange(0, N)[:, None]


@triton.jit
def load_steps(p_dt, start, stride, left, L: tl.constexpr):
    """Step sizes [L] in fp32; 0, a token that is not there, past the end."""
    at = tl.arange(0, L)
    return tl.load(p_dt + start * stride + at * stride, mask=at < left, other=0.0).to(tl.float32)


@triton.jit
def decays(b_dt, a, p_doc, start, left, L: tl.constexpr, PACKED: tl.constexpr):
    """The decays of a chunk, no exponent above 0.

    Returns:
        (high, low): [L] each, high + low = Σ_{i≤t} dt_i a log2 e. Summed in fp64 and split, since a decay between
            neighbours is a short difference of long sums: (high_t − high_u) + (low_t − low_u) keeps it.
        run: [L], resets so far in the chunk. A pair of tokens of different runs is not mixed.
        enter: [L], from the state before the chunk to t; leave: [L], from u to the chunk's end; whole: the product.
    """
    b_step = (b_dt * a).to(tl.float64) * LOG2E
    b_sum = tl.cumsum(b_step, axis=0)
    total = tl.sum(b_step, axis=0)
    high = b_sum.to(tl.float32)
    low = (b_sum - high.to(tl.float64)).to(tl.float32)
    enter = tl.exp2(high)
    leave = tl.exp2((total - b_sum).to(tl.float32))
    whole = tl.exp2(total.to(tl.float32))
    run = tl.zeros([L], tl.int32)
    if PACKED:
        at = tl.arange(0, L)
        inner = (at < left) & (at + start > 0)
        here = tl.load(p_doc + start + at, mask=inner, other=0)
        before = tl.load(p_doc + start + at - 1, mask=inner, other=0)
        reset = (inner & (here != before)).to(tl.int32)
        run = tl.cumsum(reset, axis=0)
        last = tl.sum(reset, axis=0)
        enter = tl.where(run == 0, enter, 0.0)
        leave = tl.where(run == last, leave, 0.0)
        whole = tl.where(last == 0, whole, 0.0)
    return high, low, run, enter, leave, whole


@triton.jit
def pair_decays(b_mix, high, low, run, L: tl.constexpr, PACKED: tl.constexpr):
    """[t, u]: the decay from u to t where u ≤ t in one document, else 0; exponents of other pairs are never taken.

    `b_mix` [t, u] is a product these will be multiplied with. Decays are computed in its registers' layout because the
    mask asks it something; computed by themselves they would go through shared memory to it.
    """
    at = tl.arange(0, L)
    mixed = (at[:, None] >= at[None, :]) & (b_mix == b_mix)
    if PACKED:
        mixed = mixed & (run[:, None] == run[None, :])
    exponent = tl.where(mixed, high[:, None], float("-inf")) - high[None, :]
    return tl.exp2(exponent + low[:, None] - low[None, :])
