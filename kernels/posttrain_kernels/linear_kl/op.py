"""`linear_kl`: divergence of two models from hidden states and heads, over chunks of tokens, gradient taken forward.

Four products with the vocabulary in all: both models' logits, and the two gradients of the student's. They are cuBLAS's
(the CPU's BLAS); what lies between is one row step, in Triton on CUDA (`triton_rows.py`) and in torch elsewhere
(`torch_rows.py`). `reference.py` is the contract, README.md counts passes and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain_kernels.dispatch import use_triton
from posttrain_kernels.linear_kl.inputs import check, check_rows, per_row
from posttrain_kernels.linear_kl.torch_rows import TorchRows

# Both models' logits of a chunk, together. At a vocabulary of 128,256 this leaves the operator under 1 GiB.
CHUNK_BYTES = 480 * 2**20
# Chunks are whole tiles of the matrix products: a tile of 128 rows that is half empty costs as much as a full one.
CHUNK_UNIT = 128
# The head's gradient of a bf16 head adds up in bf16, once a chunk. True: in fp32, for 4 more bytes a weight.
WIDE_HEAD_GRADIENT = False


class LinearKL(NamedTuple):
    """What `linear_kl` returns; `loss` alone carries gradients.

    Attributes:
        loss: scalar, Σ weights · divergence + Σ label_weights · cross_entropy, in fp32 (fp64 for fp64 input).
        divergence: `[N]` nats at the given temperature, 0 where a row is left out.
        cross_entropy: `[N]` nats at temperature 1, 0 where a row is left out or has no label; None without labels.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor | None


def linear_kl(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> LinearKL:
    """Weighted sum of a divergence between softmax(student_h @ student_wᵀ / T) and the teacher's, per token.

    - `forward_kl` KL(teacher ‖ student), `reverse_kl` KL(student ‖ teacher)
    - `jsd` β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student (Agarwal et al. 2023,
      arXiv:2306.13649), 0 < β < 1

    There is no T² factor. Gradients go to the student's two tensors alone and are taken with the values; `backward`
    scales them in place, so a second backward through one call is an error. Nothing waits for the device.

    Args:
        student_h, teacher_h: `[N, Ds]` and `[N, Dt]`; student_w, teacher_w: `[V, Ds]` and `[V, Dt]`.
        weights: `[N]`, each token's share of the loss; default 1.
        mask: `[N]`, 0 for tokens to leave out: their hidden states may hold anything, NaN too. Default: leave out what
            `weights` and `label_weights` both give 0. The products still run on these rows.
        labels: `[N]` int64, the token to predict (already shifted), -100 for none; adds cross-entropy at temperature 1
            with `label_weights` `[N]`, default 1. Another label that is no token makes the loss NaN (CUDA) or raises.
        chunk_tokens: most rows of logits at a time; default: what fits `CHUNK_BYTES`.
        logits_dtype: type of the logits of bf16 operands: bf16 (default), rounded as an eager head's, or fp32. Logits
            of fp32 and fp64 operands have the operands' type.

    Operands are bf16 for bf16 hidden states and under bf16 autocast on CUDA with triton, else fp32 (fp64 for fp64). The
    student's gradients have their tensors' types.

    Raises:
        ValueError: shapes, vocabularies or options that do not fit, or a temperature outside 0.01 to 100: there fp32
            leaves too little of the values or the gradients (README.md says how much within).
    """
    check(student_h, student_w, teacher_h, teacher_w, divergence, beta, temperature, logits_dtype)
    check_rows(student_h, weights=weights, mask=mask, labels=labels, label_weights=label_weights)
    wide = torch.float64 if student_h.dtype == torch.float64 else torch.float32
    keep, weights, label_weights = per_row(student_h, weights, mask, labels, label_weights, wide)
    options = _Options(divergence, beta, temperature, chunk_tokens, logits_dtype, torch.is_grad_enabled(), wide)
    labels = labels.long().contiguous() if labels is not None else None
    tensors = (teacher_h.detach(), teacher_w.detach(), weights, keep, labels, label_weights)
    return LinearKL(*_LinearKL.apply(student_h, student_w, *tensors, options))


@dataclass(frozen=True)
class _Options:
    """What the autograd function needs beside tensors; `wide` is the type of values and sums."""

    divergence: str
    beta: float
    temperature: float
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    grad: bool
    wide: torch.dtype


class _LinearKL(torch.autograd.Function):
    """Values and gradients in one pass over the tokens; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_h: Tensor,
        student_w: Tensor,
        teacher_h: Tensor,
        teacher_w: Tensor,
        weights: Tensor,
        keep: Tensor | None,
        labels: Tensor | None,
        label_weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        need_h, need_w = (options.grad and needed for needed in ctx.needs_input_grad[:2])
        product = _product_dtype(student_h, student_w, options.wide)
        with torch.autocast(student_h.device.type, enabled=False):
            gradients = _Gradients(student_h, student_w, product, need_h, need_w, options.wide)
            teacher_w = teacher_w.to(product)
            values = torch.empty_like(weights)
            ce = torch.empty_like(weights) if labels is not None else None
            bounds = list(_chunks(weights.shape[0], *_chunk_rows(student_h, student_w, product, options)))
            buffers = _buffers(student_h, student_w, product, options, max(map(len, bounds), default=0), labels)
            for chunk in bounds:
                rows = slice(chunk.start, chunk.stop)
                hidden, other = (_hidden(h[rows], product, keep, rows) for h in (student_h, teacher_h))
                _product(hidden, gradients.head.t(), buffers.student[: len(chunk)])
                _product(other, teacher_w.t(), buffers.teacher[: len(chunk)])
                per_row = (None if row is None else row[rows] for row in (weights, keep, labels, label_weights))
                values[rows], chunk_ce, grad = buffers.step(
                    *per_row,
                    divergence=options.divergence,
                    beta=options.beta,
                    temperature=options.temperature,
                    want_grad=need_h or need_w,
                )
                if ce is not None:
                    ce[rows] = chunk_ce
                if grad is not None:
                    gradients.add(rows, hidden, grad)
        ctx.save_for_backward(*gradients.finish(student_w.dtype))
        ctx.set_materialize_grads(False)
        loss = _weighted(values, weights)
        if ce is not None:
            loss = loss + _weighted(ce, label_weights)
        ctx.mark_non_differentiable(*(out for out in (values, ce) if out is not None))
        return loss.to(options.wide), values, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        # In place: a scaled copy of the head's gradient would be the operator's largest tensor a second time.
        scaled = [None if grad is None else _scale(grad, grad_loss) for grad in ctx.saved_tensors]
        return *scaled, *(None,) * 7


def _scale(grad: Tensor, factor: Tensor) -> Tensor:
    if grad.dtype == torch.float64 or not use_triton(grad, factor):
        return grad.mul_(factor.to(grad.dtype))
    from posttrain_kernels.linear_kl.scale import scale_in_place

    return scale_in_place(grad, factor)


class _Gradients:
    """The student's gradients, filled chunk by chunk; None where not needed."""

    def __init__(
        self, student_h: Tensor, student_w: Tensor, product: torch.dtype, need_h: bool, need_w: bool, wide: torch.dtype
    ) -> None:
        self.head = student_w.to(product)
        self.h = torch.empty(student_h.shape, dtype=student_h.dtype, device=student_h.device) if need_h else None
        narrow = student_w.dtype == product and student_w.is_cuda and not WIDE_HEAD_GRADIENT
        self.w = student_w.new_empty(student_w.shape, dtype=product if narrow else wide) if need_w else None
        self._wide, self._first = wide, True

    def add(self, rows: slice, hidden: Tensor, grad: Tensor) -> None:
        """`grad` `[C, V]` is the gradient to the logits of `hidden` `[C, Ds]`."""
        if self.h is not None:
            out = self.h[rows]
            if out.dtype in (grad.dtype, self._wide):
                _product(grad, self.head, out)
            else:
                out.copy_(grad @ self.head)
        if self.w is not None:
            # The first chunk writes: no pass to clear the gradient, none to read the zeros back.
            (_product if self._first else _accumulate)(grad.t(), hidden, self.w)
            self._first = False

    def finish(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        if self.w is not None and self._first:
            self.w.zero_()
        return self.h, self.w.to(dtype) if self.w is not None else None


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right`, in out's precision."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _accumulate(left: Tensor, right: Tensor, total: Tensor) -> None:
    """`total += left @ right` without rounding the product first: bf16 products of chunks would bias the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _product_dtype(hidden: Tensor, head: Tensor, wide: torch.dtype) -> torch.dtype:
    """bf16 on CUDA under bf16 autocast or for bf16 hidden states; `wide` elsewhere, and where the row step is torch's.

    On a CPU no product of bf16 operands gives fp32 results, and the torch row step has logits and gradients in `wide`.
    """
    if not hidden.is_cuda or not _on_triton(hidden, head, wide):
        return wide
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype if dtype == torch.bfloat16 else wide  # fp16 would lose gradients of a mean over many tokens


def _hidden(hidden: Tensor, product: torch.dtype, keep: Tensor | None, rows: slice) -> Tensor:
    """A chunk's hidden states; zeros in rows left out, because 0 · NaN would reach the head's gradient."""
    hidden = hidden.to(product)
    return hidden if keep is None else torch.where(keep[rows].unsqueeze(1), hidden, 0)


def _on_triton(student_h: Tensor, student_w: Tensor, wide: torch.dtype) -> bool:
    return wide == torch.float32 and use_triton(student_h, student_w)


def _logits_dtype(product: torch.dtype, options: _Options) -> torch.dtype:
    return options.logits_dtype or product if product == torch.bfloat16 else options.wide


def _buffers(
    student_h: Tensor, student_w: Tensor, product: torch.dtype, options: _Options, rows: int, labels: Tensor | None
) -> Any:
    if not _on_triton(student_h, student_w, options.wide):
        return TorchRows(rows, student_w.shape[0], options.wide, student_h.device, labels is not None)
    from posttrain_kernels.linear_kl.triton_rows import TritonRows

    return TritonRows(rows, student_w.shape[0], _logits_dtype(product, options), product, student_h.device)


def _chunk_rows(student_h: Tensor, student_w: Tensor, product: torch.dtype, options: _Options) -> tuple[int, int]:
    """(most rows of a chunk, the unit it is a multiple of)."""
    most = max(1, CHUNK_BYTES // (2 * student_w.shape[0] * _logits_dtype(product, options).itemsize))
    if options.chunk_tokens is not None:
        most = min(most, max(1, options.chunk_tokens))
    unit = min(most, CHUNK_UNIT)
    return most // unit * unit, unit


def _chunks(count: int, most: int, unit: int) -> Iterator[range]:
    """Rows in chunks of at most `most`, whole units (but for the last rows) and as even as they can be."""
    units = -(-count // unit)
    chunks = -(-units * unit // most)
    if not chunks:
        return
    starts = [index * units // chunks * unit for index in range(chunks)]
    for start, stop in zip(starts, [*starts[1:], count], strict=True):
        yield range(start, stop)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · values in fp64, where a weight of 0 silences a value that is not finite."""
    return torch.where(weights != 0, values.double() * weights, 0.0).sum()
