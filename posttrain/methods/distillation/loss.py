"""Distillation loss from hidden states: an optimiser step's reductions on top of `posttrain_kernels.linear_kl`.

TRL 1.16 has a chunked divergence (`trl.kernels.chunked_divergence`) with the same three divergences. We do not call it
because it projects both models again in the backward pass (6 products with the vocabulary, 8 for jsd, where 4 suffice
when the gradient is taken in the forward pass, as here), keeps fp32 gradients beside two 512 MiB tiles at any size, and
would project the student once more for a cross-entropy mix. `kernels/benchmarks` measures both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from posttrain_kernels.linear_kl import DIVERGENCES, IGNORE, linear_kl
from torch import Tensor

__all__ = ["DIVERGENCES", "IGNORE", "REDUCTIONS", "LossParts", "distillation_loss", "kl_from_hidden"]

REDUCTIONS = ("token_mean", "batch_sum")


class LossParts(NamedTuple):
    """A distillation loss and what it is made of; `loss` alone carries gradients.

    Attributes:
        loss: scalar to minimise, this micro-batch's share of the optimiser step's loss.
        kl_sum: sum over the unmasked tokens of the divergence, nats at the given temperature.
        ce_sum: sum over the labelled tokens of the cross-entropy at temperature 1, nats; 0 without labels.
        tokens: unmasked tokens; `labelled`: of these, tokens with a label. On CUDA a count that depends on a mask or on
            labels is a scalar tensor, because a number would wait for the device.
    """

    loss: Tensor
    kl_sum: Tensor
    ce_sum: Tensor
    tokens: int | Tensor
    labelled: int | Tensor


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
    `sequences` of the whole optimiser step when this is one micro-batch of several, `divergence` for another one.

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
    divergence: str = "forward_kl",
    beta: float = 0.5,
    tokens: int | Tensor | None = None,
    sequences: int | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_tokens: int | Tensor | None = None,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
) -> LossParts:
    """`(1 - ce_weight) · KL + ce_weight · CE` with its parts; the student's logits are computed once for both.

    Softmax and sums are fp32 (fp64 for fp64 input) also under bf16 autocast; there the products on a GPU take bf16
    operands, accumulate in fp32 and give logits in `logits_dtype`. At most `chunk_tokens` rows of logits a model exist
    at a time (None: as many as `linear_kl` finds best). The gradient is taken with the loss and `backward` scales it in
    place: call it once.

    Args:
        divergence: forward_kl (teacher to student), reverse_kl or jsd (with `beta`); see `linear_kl`.
        tokens: unmasked tokens of the whole optimiser step, for `token_mean`; default: those given here.
        sequences: sequences of the whole optimiser step, for `batch_sum`; default: B.
        labels: `[B, T]` or `[N]`, the token each position should predict (already shifted), -100 for none.
        label_tokens: labelled tokens of the whole optimiser step, for `token_mean`; default: those given here.
    """
    _check(student_h, student_w, teacher_h, teacher_w, reduction, temperature, labels, ce_weight)
    if reduction == "batch_sum" and sequences is None:
        if student_h.dim() != 3:
            raise ValueError("batch_sum of [N, D] hidden states needs `sequences`, the number of sequences of the step")
        sequences = student_h.shape[0]
    student_h, teacher_h = student_h.flatten(0, -2), teacher_h.flatten(0, -2)  # [N, Ds], [N, Dt]
    labels = labels.flatten() if labels is not None and ce_weight else None
    mask = mask.flatten().ne(0) if mask is not None else None
    if mask is not None and not mask.is_cuda:
        # On a CPU rows left out need not be computed; on CUDA choosing them would wait for the device.
        student_h, teacher_h = student_h[mask], teacher_h[mask]
        labels, mask = labels[mask] if labels is not None else None, None
    count = student_h.shape[0] if mask is None else mask.sum()
    labelled = _labelled(labels, mask)
    by_token = reduction == "token_mean"
    kl_divisor = sequences if not by_token else count if tokens is None else tokens
    ce_divisor = sequences if not by_token else labelled if label_tokens is None else label_tokens
    result = linear_kl(
        student_h,
        student_w,
        teacher_h,
        teacher_w,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        weights=_share(student_h, 1.0 - ce_weight, kl_divisor),
        # Given even when nothing is masked: a weight of 0 (ce_weight 1) must not leave a row out of kl_sum.
        mask=mask if mask is not None else student_h.new_ones(student_h.shape[0], dtype=torch.bool),
        labels=labels,
        label_weights=_share(student_h, ce_weight, ce_divisor) if labels is not None else None,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
    )
    kl_sum = result.divergence.sum(dtype=torch.float64)
    ce_sum = torch.zeros_like(kl_sum) if labels is None else result.cross_entropy.sum(dtype=torch.float64)
    return LossParts(result.loss, kl_sum, ce_sum, count, labelled)


def _labelled(labels: Tensor | None, mask: Tensor | None) -> int | Tensor:
    """Labelled tokens; a number where reading it does not wait for a device."""
    if labels is None:
        return 0
    counts = labels.ne(IGNORE)
    total = (counts if mask is None else counts & mask).sum()
    return total if total.is_cuda else int(total)


def _share(hidden: Tensor, weight: float, divisor: int | Tensor) -> Tensor:
    """`weight / divisor` for each of N tokens, `[N]`."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(divisor, Tensor):
        return (weight / divisor.clamp_min(1)).to(wide).expand(hidden.shape[0])
    return hidden.new_full(hidden.shape[:1], weight / max(divisor, 1), dtype=wide)


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
