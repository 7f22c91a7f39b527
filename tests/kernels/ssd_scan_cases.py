"""Inputs and expectations that the tests of the scan's Triton code share, interpreted and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.ssd_scan.triton_scan import triton_scan
from torch import Tensor

NAMES = ("x", "dt", "a", "b", "c", "d", "state")


def inputs(
    groups: tuple[int, int, int],
    *,
    rows: int = 1,
    length: int = 37,
    heads: int = 4,
    head: int = 16,
    state: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    decay: float = 1.0,
) -> list[Tensor]:
    """x, dt, a, b, c, d and a state; x, b and c of `groups` heads in `dtype`; `decay` scales how fast heads forget."""
    x, b, c = (
        randn(rows, length, count, width, seed=7 * seed + i, dtype=dtype)
        for i, (count, width) in enumerate(zip(groups, (head, state, state), strict=True))
    )
    dt = torch.nn.functional.softplus(randn(rows, length, heads, seed=7 * seed + 3))
    a = -decay * randn(heads, seed=7 * seed + 4).exp()
    return [x, dt, a, b, c, randn(heads, seed=7 * seed + 5), randn(rows, heads, head, state, seed=7 * seed + 6)]


def documents(rows: int, length: int, *starts: int) -> Tensor:
    """Row 0 has documents from `starts` on, of which every other has the same number; more rows have one more each."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        for number, start in enumerate(sorted({*starts, *range(1, row + 1)})):
            ids[row, start:] = 1 - number % 2
    return ids


def judge(
    scan: Callable[..., tuple[Tensor, Tensor]],
    tensors: list[Tensor],
    ids: Tensor | None,
    tolerance: float,
    *,
    of_a: float | None = None,
    operands: torch.dtype | None = None,
    **options: object,
) -> tuple[Tensor, ...]:
    """y, the last state and all gradients of the Triton code beside those of `scan` in fp64; returns the Triton code's.

    `of_a`: another tolerance for a's gradient, a sum over everything that may all but cancel. `operands`: the type in
    which products take x, b, c and y's gradient, so that what this rounding alone does (to a's gradient most of all) is
    not taken for an error.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y, last = triton_scan(*leaves, ids, **({"chunk": 64} | options))
    grad_y, grad_last = (
        randn(*out.shape, seed=99 + i, dtype=out.dtype).to(out.device) for i, out in enumerate((y, last))
    )
    found = (y, last, *torch.autograd.grad((y, last), leaves, (grad_y, grad_last)))
    if operands:
        tensors = [
            t.to(operands).to(t) if name in ("x", "b", "c") else t for name, t in zip(NAMES, tensors, strict=True)
        ]
        grad_y = grad_y.to(operands)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = scan(*wide[:6], initial_state=wide[6], documents=ids)
    expected += torch.autograd.grad(expected, wide, (grad_y.double(), grad_last.double()))
    for name, ours, theirs in zip(("y", "last", *NAMES), found, expected, strict=True):
        error, limit = relative_error(ours, theirs), (of_a or tolerance) if name == "a" else tolerance
        assert error < limit, f"{name} is off by {error:.1e}, allowed {limit:.0e}"
    for ours, tensor in zip(found[2:], tensors, strict=True):
        assert (ours.dtype, ours.shape) == (tensor.dtype, tensor.shape)
    return found
