"""Latent decoding at long contexts, timed as replays of a CUDA graph, beside the generic kernel and torch.

One cache of 64 rows and 32,768 slots serves all cases of a width. Calls of a smaller batch rotate among its rows, so
that they read memory and not the L2 cache (50 MiB on an H200, one row of 512+64 is 36 MiB). All slots are valid: peers
need no mask. SDPA is given the form it is best at: the heads as queries of one key/value head, keys concatenated
beforehand.

Limit: the larger of the bytes (latents, rotary keys, queries, outputs) over the measured copy rate, and of the
operations over 600 TFLOP/s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from posttrain_kernels.decode_attention import decode_attention
from posttrain_kernels.mla_decode import mla_decode, mla_decode_reference
from torch import Tensor, nn

from benchmarks.ceilings import Ceilings
from benchmarks.harness import OURS, Case, Measurement
from benchmarks.heads import dtype_for

MATMUL_TFLOP_S = 600.0
"""What a well-tuned matrix kernel keeps up on the shapes of attention; large square products reach more."""
GRAPH_CALLS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: batch, query heads, latent and rotary width, context, rows of the cache."""

    batch: int
    heads: int
    rank: int
    rope: int
    context: int
    rows: int

    def bytes(self, itemsize: int = 2) -> float:
        """Least bytes moved: the context of every row once, queries and outputs."""
        cached = self.batch * self.context * (self.rank + self.rope)
        return itemsize * (cached + self.batch * self.heads * (2 * self.rank + self.rope))

    def flops(self) -> float:
        """2 · H · (2r + d_r) a cached token."""
        return 2.0 * self.batch * self.context * self.heads * (2 * self.rank + self.rope)

    def limit_ms(self, ceilings: Ceilings, itemsize: int = 2) -> float:
        """The larger of both terms."""
        return max(ceilings.bytes_ms(self.bytes(itemsize)), self.flops() / MATMUL_TFLOP_S / 1e9)

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} r{self.rank} dr{self.rope} S{self.context}"


SHAPES = tuple(
    Shape(batch, heads, rank, rope, 32768, 64)
    for (rank, rope), heads, batch in itertools.product(((512, 64), (128, 32)), (16, 32, 128), (1, 4, 16, 64))
)
QUICK_SHAPES = (Shape(2, 3, 48, 16, 100, 3),)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Every width, number of heads and batch."""
    return [_case(shape, device) for shape in (QUICK_SHAPES if quick else SHAPES)]


def summary(results: Iterable[Measurement]) -> str:
    """Achieved bytes, operations and share of the limit of the right implementations, a line each."""
    right = [result for result in results if result.timing and result.correct and result.case.shape in SHAPE_OF]
    lines = [f"{'mla_decode':60}{'ms':>9}{'GB/s':>8}{'TFLOP/s':>9}{'% limit':>9}"] if right else []
    for result in right:
        shape, ms = SHAPE_OF[result.case.shape], result.timing.median_ms
        rates = f"{shape.bytes() / ms / 1e6:8.0f}{shape.flops() / ms / 1e9:9.1f}"
        name = f"{result.case.shape} {result.implementation}"
        lines.append(f"{name:60}{ms:9.4f}{rates}{100 * (result.limit_ms or 0) / ms:9.1f}")
    return "\n".join(lines)


SHAPE_OF = {str(shape): shape for shape in (*SHAPES, *QUICK_SHAPES)}


@lru_cache(maxsize=1)
def caches(rows: int, context: int, rank: int, rope: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random caches [rows, S, r] and [rows, S, d_r]; one pair is kept, for the cases that share it."""
    generator = torch.Generator(device).manual_seed(0)
    make = (torch.empty(rows, context, width, device=device, dtype=dtype_for(device)) for width in (rank, rope))
    return tuple(cache.normal_(generator=generator) for cache in make)


def _case(shape: Shape, device: torch.device) -> Case:
    functions = {OURS: _ours, f"{OURS}_decode_attention": _generic, "sdpa": _sdpa, "eager": _eager}
    graph_calls = GRAPH_CALLS if shape.batch < 16 else 2
    return Case(
        operator="mla_decode",
        shape=str(shape),
        dtype=str(dtype_for(device)).removeprefix("torch."),
        direction="fwd",
        inputs=lambda: _inputs(shape, device),
        implementations={name: _rotating(make, shape) for name, make in functions.items()},
        reference=lambda given: {"out": _reference(shape, *given)},
        limit_ms=lambda ceilings: shape.limit_ms(ceilings, dtype_for(device).itemsize),
        graph_calls=graph_calls,
        flush=False,
    )


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Scaled so that scores spread by about 2: attention neither uniform nor on one slot.
    q_latent, q_rope = (
        2 * torch.randn(shape.batch, shape.heads, width, device=device).to(dtype_for(device))
        for width in (shape.rank, shape.rope)
    )
    return q_latent, q_rope, *caches(shape.rows, shape.context, shape.rank, shape.rope, device)


def _reference(shape: Shape, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
    """fp64, a row at a time."""
    start, length = torch.zeros(1, dtype=torch.long, device=latent.device), _length(shape, latent.device)
    rows = []
    for row in range(shape.batch):
        wide = (x[row : row + 1].double() for x in (q_latent, q_rope, latent, rope))
        rows.append(mla_decode_reference(*wide, start, length, _scale(shape)))
    return torch.cat(rows)


def _rotating(make: Callable[..., Callable[[], Tensor]], shape: Shape) -> Callable[[Any], tuple]:
    """Call after call takes the next rows of the cache; the reference is that of the first rows."""

    def implementation(given: tuple) -> tuple[Callable[[], Tensor], Callable[[Tensor], dict[str, Tensor]]]:
        q_latent, q_rope, latent, rope = given
        sets = min(GRAPH_CALLS, shape.rows // shape.batch)
        calls = [
            make(shape, q_latent, q_rope, *(x[n * shape.batch : (n + 1) * shape.batch] for x in (latent, rope)))
            for n in range(sets)
        ]
        # The harness judges the second call: the one before it compiles.
        turn = itertools.cycle([calls[-1], *calls[:-1]])
        return (lambda: next(turn)()), (lambda out: {"out": out})

    return implementation


def _scale(shape: Shape) -> float:
    return (shape.rank + shape.rope) ** -0.5


def _length(shape: Shape, device: torch.device) -> Tensor:
    return torch.full((1,), shape.context, dtype=torch.long, device=device)


def _ours(shape: Shape, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Callable[[], Tensor]:
    start = torch.zeros(shape.batch, dtype=torch.long, device=latent.device)
    length = _length(shape, latent.device)
    return lambda: mla_decode(q_latent, q_rope, latent, rope, start, length, _scale(shape))


def _generic(shape: Shape, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Callable[[], Tensor]:
    start = torch.zeros(shape.batch, dtype=torch.long, device=latent.device)
    length = _length(shape, latent.device)
    return lambda: decode_attention(q_latent, latent, latent, start, length, _scale(shape), q_rope, rope)


def _sdpa(shape: Shape, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Callable[[], Tensor]:
    query = torch.cat((q_latent, q_rope), dim=-1).unsqueeze(1)  # [B, 1, H, r + d_r]
    keys, values = torch.cat((latent, rope), dim=-1).unsqueeze(1), latent.unsqueeze(1)
    attend = nn.functional.scaled_dot_product_attention
    return lambda: attend(query, keys, values, scale=_scale(shape)).squeeze(1)


def _eager(shape: Shape, q_latent: Tensor, q_rope: Tensor, latent: Tensor, rope: Tensor) -> Callable[[], Tensor]:
    """The products of the model's own absorbed path."""

    def run() -> Tensor:
        scores = torch.baddbmm(torch.bmm(q_rope, rope.transpose(1, 2)), q_latent, latent.transpose(1, 2))
        return torch.bmm((scores.float() * _scale(shape)).softmax(dim=-1).to(latent.dtype), latent)

    return run
