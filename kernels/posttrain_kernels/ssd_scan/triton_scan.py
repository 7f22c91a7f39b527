"""`ssd_scan` and `ssd_step` on the Triton kernels: what they take, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import on_own_device, use_triton
from .tiles import WIDTHS, Plan

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor | None
) -> bool:
    """Whether the kernels run this: widths of 16 to 128 in powers of two, no fp64, some rows."""
    tensors = [tensor for tensor in (x, dt, a, b, c, d, state) if tensor is not None]
    fits = x.shape[-1] in WIDTHS and b.shape[-1] in WIDTHS and x.shape[0] > 0
    return fits and all(tensor.dtype in TYPES for tensor in tensors) and use_triton(*tensors)


def supports_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None = None,
) -> bool:
    """Whether the kernel runs this step: any width, no fp64, a state whose last dimension is dense."""
    tensors = [tensor for tensor in (x, dt, a, b, c, d, dt_bias) if tensor is not None]
    fits = state.dtype == torch.float32 and state.stride(-1) == 1
    return fits and all(tensor.dtype in TYPES for tensor in tensors) and use_triton(state, *tensors)


@on_own_device
def triton_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    documents: Tensor | None,
    chunk: int,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton code behind `ssd_scan`; same contract, checks done. `plan`: launch shapes other than the chosen."""
    return _Scan.apply(x, dt, a, b, c, d, initial_state, documents, chunk, plan)


class _Scan(torch.autograd.Function):
    """Keeps the inputs alone (and the few states between segments); once differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        initial_state: Tensor | None,
        documents: Tensor | None,
        chunk: int,
        plan: Plan | None,
    ) -> tuple[Tensor, Tensor]:
        from .launch import Scan, scan_forward

        scan = Scan.of(x, dt, a, b, c, d, documents, chunk, plan)
        y, last, first = scan_forward(scan, initial_state)
        ctx.save_for_backward(x, dt, a, b, c, d, documents, first)
        ctx.chunk, ctx.plan, ctx.operands = chunk, scan.plan, scan.operands
        ctx.state_type = None if initial_state is None else initial_state.dtype
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        from .launch import Scan, scan_backward

        if grad_y is None and grad_last is None:
            return (None,) * 10
        x, dt, a, b, c, d, documents, first = ctx.saved_tensors
        if grad_y is None:
            grad_y = x.new_zeros(()).expand(*dt.shape, x.shape[-1])
        scan = Scan.of(x, dt, a, b, c, d, documents, ctx.chunk, ctx.plan, ctx.operands)
        grads = scan_backward(scan, first, grad_y, grad_last)
        kinds = (x.dtype, dt.dtype, a.dtype, b.dtype, c.dtype, None if d is None else d.dtype, ctx.state_type)
        wanted = zip(grads, kinds, ctx.needs_input_grad[:7], strict=True)
        return *(grad.to(kind) if kind and needed else None for grad, kind, needed in wanted), None, None, None
