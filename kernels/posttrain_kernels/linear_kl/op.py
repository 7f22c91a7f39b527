"""`linear_kl`: divergence of two models from hidden states and heads, over chunks of tokens, gradient taken forward.

Four products with the vocabulary in all: both models' logits, and the two gradients of the student's. They are cuBLAS's
(the CPU's BLAS), taken a chunk at a time (`chunked.py`); what lies between is one row step, in Triton on CUDA
(`triton_rows.py`) and in torch elsewhere (`torch_rows.py`). `reference.py` is the contract, README.md counts passes and
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain_kernels.linear_kl import chunked
from posttrain_kernels.linear_kl.inputs import check, check_rows, per_row
from posttrain_kernels.linear_kl.torch_rows import TorchRows


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
        chunk_tokens: most rows of logits at a time; default: what fits `chunked.CHUNK_BYTES`.
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
        product = chunked.product_dtype(student_h, student_w, options.wide)
        with torch.autocast(student_h.device.type, enabled=False):
            gradients = chunked.Gradients(student_h, student_w, product, need_h, need_w, options.wide)
            teacher_w = teacher_w.to(product)
            values = torch.empty_like(weights)
            ce = torch.empty_like(weights) if labels is not None else None
            narrow = chunked.logits_dtype(product, options.wide, options.logits_dtype)
            most = chunked.chunk_rows(len(student_w), narrow, options.chunk_tokens)
            bounds = list(chunked.even_chunks(len(weights), *most))
            largest = max(map(len, bounds), default=0)
            buffers = _buffers(student_h, student_w, product, narrow, options.wide, largest, labels)
            for chunk in bounds:
                rows = slice(chunk.start, chunk.stop)
                hidden, other = (chunked.kept_hidden(h[rows], product, keep, rows) for h in (student_h, teacher_h))
                chunked.multiply(hidden, gradients.head.t(), buffers.student[: len(chunk)])
                chunked.multiply(other, teacher_w.t(), buffers.teacher[: len(chunk)])
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
        loss = chunked.weighted_sum(values, weights)
        if ce is not None:
            loss = loss + chunked.weighted_sum(ce, label_weights)
        ctx.mark_non_differentiable(*(out for out in (values, ce) if out is not None))
        return loss.to(options.wide), values, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 9
        scaled = [None if grad is None else chunked.scale_gradient(grad, grad_loss) for grad in ctx.saved_tensors]
        return *scaled, *(None,) * 7


def _buffers(
    student_h: Tensor,
    student_w: Tensor,
    product: torch.dtype,
    logits: torch.dtype,
    wide: torch.dtype,
    rows: int,
    labels: Tensor | None,
) -> Any:
    if not chunked.on_triton(student_h, student_w, wide):
        return TorchRows(rows, len(student_w), wide, student_h.device, labels is not None)
    from posttrain_kernels.linear_kl.triton_rows import TritonRows

    return TritonRows(rows, len(student_w), logits, product, student_h.device)
