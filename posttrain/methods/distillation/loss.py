"""Distillation loss from hidden states, over chunks of tokens: the `[tokens, vocabulary]` logits never exist at once.

TRL 1.16 has a chunked divergence (`trl.kernels.chunked_divergence`) with the same forward KL. We do not call it because

- it projects both models again in the backward pass: 6 products with the vocabulary where 4 suffice when the gradient
  is taken in the forward pass, as here; on a CPU these products are a good part of a small model's step;
- its tile, 4,096 tokens by 32,768 entries, is a module constant: with a micro-batch and a vocabulary below that the
  full logits do exist, and a CPU run holds two 512 MiB tiles;
- a cross-entropy mix would project the student once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("token_mean", "batch_sum")
IGNORE = -100


class LossParts(NamedTuple):
    """A distillation loss and what it is made of; `loss` alone carries gradients.

    Attributes:
        loss: scalar to minimise, this micro-batch's share of the optimiser step's loss.
        kl_sum: sum over the unmasked tokens of KL(teacher || student), nats at the given temperature.
        ce_sum: sum over the labelled tokens of the cross-entropy at temperature 1, nats; 0 without labels.
        tokens: unmasked tokens; `labelled`: of these, tokens with a label.
    """

    loss: Tensor
    kl_sum: Tensor
    ce_sum: Tensor
    tokens: int
    labelled: int


def kl_from_hidden(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    temperature: float = 1.0,
    **options: Any,
) -> Tensor:
    """KL(teacher || student) of next-token distributions from hidden states; a scalar with gradients for the student.

    With p = softmax(h Wᵀ / temperature) and no T² factor:

    - `token_mean`: Σ KL / tokens
    - `batch_sum`: Σ KL / sequences, the sum over tokens that `batchmean` on `[B, T, V]` gives and that X-EcoMLA's
      published code trains with (Li et al. 2025, arXiv:2503.11132)

    `student_h` is `[B, T, Ds]` or `[N, Ds]`, `teacher_h` the same with its own width, the heads are `[V, D]`, `mask` is
    `[B, T]` or `[N]` with 0 for tokens to leave out. `options` are those of `distillation_loss`: pass `tokens` or
    `sequences` of the whole optimiser step when this is one micro-batch of several.

    Raises:
        ValueError: unknown reduction, shapes or vocabularies that do not match, `batch_sum` of flat input without
            `sequences`.
    """
    return distillation_loss(student_h, student_w, teacher_h, teacher_w, mask, reduction, temperature, **options).loss


def distillation_loss(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    temperature: float = 1.0,
    *,
    tokens: int | None = None,
    sequences: int | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_tokens: int | None = None,
    chunk_tokens: int = 1024,
) -> LossParts:
    """`(1 - ce_weight) · KL + ce_weight · CE` with its parts; the student's logits are computed once for both.

    Logits, softmax and sums are fp32 (fp64 for fp64 input) also under bf16 autocast; there the products on a GPU take
    bf16 operands and accumulate in fp32. At most `chunk_tokens` rows of logits per model exist at a time.

    Args:
        tokens: unmasked tokens of the whole optimiser step, for `token_mean`; default: those given here.
        sequences: sequences of the whole optimiser step, for `batch_sum`; default: B.
        labels: `[B, T]` or `[N]`, the token each position should predict (already shifted), -100 for none.
        label_tokens: labelled tokens of the whole optimiser step, for `token_mean`; default: those given here.
    """
    _check(student_h, student_w, teacher_h, teacher_w, reduction, temperature, labels, ce_weight)
    if sequences is None and student_h.dim() == 3:
        sequences = student_h.shape[0]
    student_h, teacher_h = student_h.flatten(0, -2), teacher_h.flatten(0, -2)  # [N, Ds], [N, Dt]
    labels = labels.flatten() if labels is not None and ce_weight else None
    if mask is not None:
        kept = mask.flatten().ne(0).nonzero().squeeze(1)
        student_h, teacher_h = student_h[kept], teacher_h[kept]
        labels = labels[kept] if labels is not None else None
    count = student_h.shape[0]
    labelled = int(labels.ne(IGNORE).sum()) if labels is not None else 0
    if reduction == "batch_sum":
        if sequences is None:
            raise ValueError("batch_sum of [N, D] hidden states needs `sequences`, the number of sequences of the step")
        kl_divisor = ce_divisor = sequences
    else:
        kl_divisor = count if tokens is None else tokens
        ce_divisor = labelled if label_tokens is None else label_tokens
    terms = _Terms(
        temperature=temperature,
        kl_scale=(1.0 - ce_weight) / max(kl_divisor, 1),
        ce_scale=ce_weight / max(ce_divisor, 1) if labels is not None else 0.0,
        chunk=max(1, chunk_tokens),
        grad=torch.is_grad_enabled(),
    )
    loss, kl_sum, ce_sum = _ChunkedLoss.apply(
        student_h, student_w, teacher_h.detach(), teacher_w.detach(), labels, terms
    )
    return LossParts(loss, kl_sum, ce_sum, count, labelled)


@dataclass(frozen=True)
class _Terms:
    """What the autograd function needs beside tensors."""

    temperature: float
    kl_scale: float
    ce_scale: float
    chunk: int
    grad: bool


class _ChunkedLoss(torch.autograd.Function):
    """Loss and its gradients in one pass over the tokens; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any, student_h: Tensor, student_w: Tensor, teacher_h: Tensor, teacher_w: Tensor, labels: Any, terms: _Terms
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if student_h.dtype == torch.float64 else torch.float32
        product = _product_dtype(student_h, wide)
        student_w_, teacher_w_ = student_w.to(product), teacher_w.to(product)
        need_h, need_w = (terms.grad and needed for needed in ctx.needs_input_grad[:2])
        grad_h = torch.empty_like(student_h) if need_h else None
        grad_w = torch.zeros(student_w.shape, dtype=wide, device=student_w.device) if need_w else None
        kl_sum = torch.zeros((), dtype=torch.float64, device=student_h.device)
        ce_sum = torch.zeros_like(kl_sum)
        for start in range(0, student_h.shape[0], terms.chunk):
            rows = slice(start, start + terms.chunk)
            hidden = student_h[rows].to(product)
            sums, grad = _chunk(
                (hidden, student_w_),
                (teacher_h[rows].to(product), teacher_w_),
                None if labels is None else labels[rows],
                terms,
                need_h or need_w,
            )
            kl_sum += sums[0]
            ce_sum += sums[1]
            if grad is not None:
                grad = grad.to(product)
                if grad_h is not None:
                    grad_h[rows] = _product(grad, student_w_, wide)
                if grad_w is not None:
                    _accumulate(grad_w, grad.t(), hidden)
        ctx.dtype_w = student_w.dtype
        ctx.save_for_backward(grad_h, grad_w)
        loss = (terms.kl_scale * kl_sum + terms.ce_scale * ce_sum).to(wide)
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return loss, kl_sum, ce_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_h, grad_w = ctx.saved_tensors
        grad_h = grad_h * grad_loss.to(grad_h.dtype) if grad_h is not None else None
        grad_w = (grad_w * grad_loss).to(ctx.dtype_w) if grad_w is not None else None
        return grad_h, grad_w, None, None, None, None


def _chunk(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels: Tensor | None,
    terms: _Terms,
    want_grad: bool,
) -> tuple[tuple[Tensor, Tensor | float], Tensor | None]:
    """Sums of KL and CE over a chunk, and the loss's gradient to the student's logits `[C, V]`.

    The models come as (hidden `[C, D]`, head `[V, D]`). Three `[C, V]` tensors live at a time, four with labels.
    """
    wide = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    logits = _product(student[0], student[1].t(), wide)
    ce, grad_ce = _cross_entropy(logits, labels, terms.ce_scale, want_grad)
    log_p = logits.div_(terms.temperature).log_softmax(-1)
    logits = _product(teacher[0], teacher[1].t(), wide)
    log_q = logits.div_(terms.temperature).log_softmax(-1)
    del logits
    q = log_q.exp()
    kl = log_q.sub_(log_p).mul_(q).sum(-1).sum(dtype=torch.float64)
    del log_q
    if not want_grad:
        return (kl, ce), None
    grad = log_p.exp_().sub_(q).mul_(terms.kl_scale / terms.temperature)
    return (kl, ce), grad if grad_ce is None else grad.add_(grad_ce)


def _cross_entropy(
    logits: Tensor, labels: Tensor | None, scale: float, want_grad: bool
) -> tuple[Tensor | float, Tensor | None]:
    """Sum of the labelled tokens' cross-entropy, and `scale` times its gradient to the logits `[C, V]`."""
    if labels is None:
        return 0.0, None
    log_p = logits.log_softmax(-1)
    target = labels.clamp_min(0).unsqueeze(1)  # [C, 1]
    valid = labels.ne(IGNORE).to(logits.dtype).unsqueeze(1)
    ce = -(log_p.gather(1, target) * valid).sum(dtype=torch.float64)
    if not want_grad:
        return ce, None
    p = log_p.exp_()
    return ce, p.scatter_(1, target, p.gather(1, target) - 1).mul_(valid * scale)


def _product_dtype(hidden: Tensor, wide: torch.dtype) -> torch.dtype:
    """bf16 on a GPU under bf16 autocast or for bf16 hidden states; `wide` elsewhere.

    On a CPU no product of bf16 operands gives fp32 results, and rounding logits to bf16 puts a floor under the KL.
    """
    if hidden.device.type != "cuda" or wide == torch.float64:
        return wide
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
    return dtype if dtype == torch.bfloat16 else wide  # fp16 would lose gradients of a mean over many tokens


def _product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """`left @ right` in `wide` precision, whatever the operands' (which autocast must not change)."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right if left.dtype == wide else torch.mm(left, right, out_dtype=wide)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` without rounding the product first: bf16 products of chunks would bias the sum."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == total.dtype:
            total.addmm_(left, right)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _check(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    reduction: str,
    temperature: float,
    labels: Tensor | None,
    ce_weight: float,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: use one of {', '.join(REDUCTIONS)}")
    if student_w.shape[0] != teacher_w.shape[0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {student_w.shape[0]} and {teacher_w.shape[0]} rows; "
            "cut padded rows off the larger head (a padded row has probability too)"
        )
    if student_h.shape[:-1] != teacher_h.shape[:-1]:
        raise ValueError(f"student and teacher positions differ: {tuple(student_h.shape)}, {tuple(teacher_h.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
