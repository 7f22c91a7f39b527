"""Mamba-2's scan, forward and with backward, and one step of it, beside torch's chunks, fla and mamba_ssm.

    python kernels/benchmarks/run.py --only ssd_scan ssd_step           # the sizes below
    python scripts/bench_ssd_scan.py --batch 8 --tokens 4096 …          # any other

What the peers are: `torch_chunks` is this package's code for other devices; `fla` is `chunk_simple_gla` of
flash-linear-attention, whose keys, queries and values have all heads, so that shared ones are repeated within the
measured time, as a mixer that called it would; `mamba_ssm` is `mamba_chunk_scan_combined` and `selective_state_update`,
which share b and c and not x. All compute the same outputs and gradients.

Limit: bytes over the measured copy rate. Forward: x, dt, b, c read, y and the last state written; backward: those four
and y's gradient read, four gradients written. States between chunks are not counted, nor is any second read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from posttrain_kernels.ssd_scan import ssd_scan, ssd_step, ssd_step_reference
from posttrain_kernels.ssd_scan.torch_scan import chunked_scan, single_step
from torch import Tensor

from benchmarks.harness import OURS, Case
from benchmarks.heads import dtype_for

TOLERANCE = {"y": 1e-2, "last": 1e-2} | {f"grad_{name}": 2e-2 for name in ("x", "dt", "a", "b", "c", "d")}
"""Products of bf16 operands; a wrong decay or a lost term is far above."""
GRAPH_CALLS = 16
ROTATED_BYTES = 256 * 2**20
"""States that steps rotate among add up to this at least: the L2 cache of an H200 holds 50 MiB."""

Prepared = tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]


@dataclass(frozen=True)
class Shape:
    """Rows, tokens, heads of decays, of x, of b and of c, head and state width."""

    batch: int
    tokens: int
    heads: int
    groups: tuple[int, int, int]
    head: int = 64
    state: int = 64

    def bytes(self, itemsize: int, backward: bool) -> float:
        """Least bytes moved, see the module."""
        of_x, of_b, of_c = self.groups
        inputs = itemsize * (of_x * self.head + (of_b + of_c) * self.state) + 4 * self.heads
        outputs = itemsize * self.heads * self.head
        a_token = (3 * inputs + 2 * outputs) if backward else inputs + outputs
        return self.batch * (self.tokens * a_token + 4.0 * self.heads * self.head * self.state)

    def __str__(self) -> str:
        x, b, c = self.groups
        return f"B{self.batch} T{self.tokens} H{self.heads} x{x} b{b} c{c} P{self.head} N{self.state}"


SHAPES = (
    Shape(8, 4096, 32, (32, 32, 32)),
    Shape(8, 4096, 32, (8, 8, 32)),
    Shape(8, 4096, 32, (32, 1, 1)),
    Shape(1, 16384, 8, (8, 8, 8)),
    Shape(4, 4096, 32, (8, 8, 32), 128, 128),
)
"""All heads; Llama-3.2-1B's grouped-query attention made recurrent; stock Mamba-2; few heads and a long row; 8B's."""
QUICK = Shape(2, 45, 4, (2, 2, 4), 16, 16)
STEPS = (Shape(1, 1, 32, (8, 8, 32)), Shape(128, 1, 32, (8, 8, 32)))


@dataclass(frozen=True)
class Inputs:
    """Of one case; `grad` [B, T, H, P] is the gradient of y."""

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    grad: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.dt, self.a, self.b, self.c, self.d


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Each shape forward and with backward, then single steps."""
    scans = [scan_case(shape, device, way) for shape in ((QUICK,) if quick else SHAPES) for way in (False, True)]
    return scans + [_step_case(shape, device) for shape in ((QUICK,) if quick else STEPS)]


def scan_case(shape: Shape, device: torch.device, backward: bool) -> Case:
    """The scan of one shape."""
    dtype = dtype_for(device)
    peers = {OURS: _ours, "torch_chunks": _torch_chunks, "fla": _fla, "mamba_ssm": _mamba_ssm}
    return Case(
        operator="ssd_scan",
        shape=str(shape),
        dtype=str(dtype).removeprefix("torch."),
        direction="fwd+bwd" if backward else "fwd",
        inputs=lambda: make_inputs(shape, device, dtype),
        implementations={name: _prepared(peer, backward) for name, peer in peers.items()},
        reference=lambda inputs: reference(inputs, backward),
        limit_ms=lambda ceilings: ceilings.bytes_ms(shape.bytes(dtype.itemsize, backward)),
        tolerance=TOLERANCE,
    )


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Step sizes and decays as Mamba-2 starts: dt log-uniform in 1e-3 … 0.1, −a uniform in 1 … 16."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    lead, heads = (shape.batch, shape.tokens), shape.heads
    x, b, c = (
        normal(*lead, count, width)
        for count, width in zip(shape.groups, (shape.head, shape.state, shape.state), strict=True)
    )
    dt = 10.0 ** (torch.rand(*lead, heads, device=device) * 2 - 3)
    a = -1 - 15 * torch.rand(heads, device=device)
    return Inputs(x, dt, a, b, c, torch.randn(heads, device=device), normal(*lead, heads, shape.head))


def _prepared(peer: Callable[..., Callable[[], Tensor]], backward: bool) -> Callable[[Inputs], Prepared]:
    """`peer(inputs of which leaves want gradients)` gives what computes y."""

    def make(inputs: Inputs) -> Prepared:
        leaves = [leaf.detach().requires_grad_(backward) for leaf in inputs.leaves]
        scan = peer(*leaves)
        names = ["y", *(f"grad_{name}" for name in ("x", "dt", "a", "b", "c", "d") if backward)]

        def run() -> tuple[Tensor, ...]:
            y = scan()
            return (y.detach(), *(torch.autograd.grad(y, leaves, inputs.grad.to(y.dtype)) if backward else ()))

        return run, lambda result: dict(zip(names, result, strict=True))

    return make


def _ours(*leaves: Tensor) -> Callable[[], Tensor]:
    return lambda: ssd_scan(*leaves)[0]


def _torch_chunks(*leaves: Tensor) -> Callable[[], Tensor]:
    return lambda: chunked_scan(*leaves)[0]


def _fla(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Callable[[], Tensor]:
    from fla.ops.simple_gla import chunk_simple_gla

    def all_heads(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(dt.shape[2] // tensor.shape[2], dim=2)

    def scan() -> Tensor:
        x_h = all_heads(x)
        driven = (x_h * dt[..., None]).to(x.dtype)
        y, _ = chunk_simple_gla(q=all_heads(c), k=all_heads(b), v=driven, g=dt * a, scale=1.0)
        return (y + d[:, None] * x_h).to(x.dtype)

    return scan


def _mamba_ssm(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Callable[[], Tensor]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def scan() -> Tensor:
        groups = max(b.shape[2], c.shape[2])
        b_h, c_h = (part.repeat_interleave(groups // part.shape[2], dim=2) for part in (b, c))
        x_h = x.repeat_interleave(dt.shape[2] // x.shape[2], dim=2)
        return mamba_chunk_scan_combined(x_h, dt, a, b_h, c_h, chunk_size=256, D=d)

    return scan


def reference(inputs: Inputs, backward: bool) -> dict[str, Tensor]:
    """Torch's chunks in fp32 (fp64 on a CPU), a row at a time."""
    wide = torch.float64 if inputs.x.device.type == "cpu" else torch.float32
    rows = []
    for row in range(len(inputs.x)):
        part = slice(row, row + 1)
        x, dt, b, c = (tensor[part] for tensor in (inputs.x, inputs.dt, inputs.b, inputs.c))
        leaves = [leaf.to(wide, copy=True).requires_grad_(backward) for leaf in (x, dt, inputs.a, b, c, inputs.d)]
        y, _ = chunked_scan(*leaves)
        grads = torch.autograd.grad(y, leaves, inputs.grad[part].to(wide)) if backward else ()
        rows.append((y.detach(), *grads))
    y, *grads = zip(*rows, strict=True)
    found = {"y": torch.cat(y)}
    for name, parts in zip(("x", "dt", "a", "b", "c", "d"), grads, strict=False):
        found[f"grad_{name}"] = torch.stack(parts).sum(0) if name in "ad" else torch.cat(parts)
    return found


def _step_case(shape: Shape, device: torch.device) -> Case:
    """One token for each row, in place on its state; calls rotate among states."""
    dtype, states = dtype_for(device), 4 * shape.batch * shape.heads * shape.head * shape.state
    copies = max(1, -(-ROTATED_BYTES // states)) if device.type == "cuda" else 1

    def inputs() -> tuple[Tensor, ...]:
        x, dt, a, b, c, d = make_inputs(shape, device, dtype).leaves
        state = torch.randn(copies, shape.batch, shape.heads, shape.head, shape.state, device=device)
        return x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state, d

    return Case(
        operator="ssd_step",
        shape=str(shape),
        dtype=str(dtype).removeprefix("torch."),
        direction="step",
        inputs=inputs,
        implementations={
            OURS: _stepping(lambda *given: ssd_step(*given)),
            "torch_chunks": _stepping(single_step),
            "mamba_ssm": _stepping_mamba,
        },
        reference=_step_reference,
        limit_ms=lambda ceilings: ceilings.bytes_ms(2 * states),
        tolerance=1e-2,
        graph_calls=GRAPH_CALLS,
    )


def _stepping(step: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...]], Prepared]:
    """Timed on copies that change from call to call; judged on a fresh one, which a timed call has no more."""

    def make(inputs: tuple[Tensor, ...]) -> Prepared:
        *before, states, d = inputs
        turn = itertools.cycle(states.clone())

        def outputs(_: Tensor) -> dict[str, Tensor]:
            fresh = states[0].clone()
            return {"y": step(*before, fresh, d), "last": fresh}

        return lambda: step(*before, next(turn), d), outputs

    return make


def _stepping_mamba(inputs: tuple[Tensor, ...]) -> Prepared:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    def step(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, d: Tensor) -> Tensor:
        heads, head, width = state.shape[1:]
        groups = max(b.shape[1], c.shape[1])
        b, c = (part.repeat_interleave(groups // part.shape[1], dim=1) for part in (b, c))
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
        wide = (dt[..., None].expand(-1, -1, head), a[:, None, None].expand(-1, head, width))
        return selective_state_update(state, x, *wide, b, c, D=d[:, None].expand(-1, head))

    return _stepping(step)(inputs)


@torch.no_grad()
def _step_reference(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    *before, states, d = (tensor.double() for tensor in inputs)
    y, last = ssd_step_reference(*before, states[0], d)
    return {"y": y, "last": last}
