"""Distillation loss from hidden states: an optimiser step's reductions on top of `posttrain_kernels.linear_kl`.

TRL 1.16 has a chunked divergence (`trl.kernels.chunked_divergence`) with the same three divergences. We do not call it
because it projects both models again in the backward pass (6 products with the vocabulary, 8 for jsd, where 4 suffice
when the gradient is taken in the forward pass, as here), keeps fp32 gradients beside two 512 MiB tiles at any size, and
would project the student once more for a cross-entropy mix. `kernels/benchmarks` measures both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from posttrain_kernels.linear_kl import DIVERGENCES, IGNORE, LinearKL, linear_kl
from torch import Tensor

from posttrain.methods.distillation.topk import TopK, linear_top_k_kl

__all__ = [
    "DIVERGENCES",
    "IGNORE",
    "REDUCTIONS",
    "LossParts",
    "TopK",
    "distillation_loss",
    "kl_from_hidden",
    "top_k_loss",
]

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
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    **step: Any,
) -> LossParts:
    """`(1 - ce_weight) · KL + ce_weight · CE` with its parts; the student's logits are computed once for both.

    Softmax and sums are fp32 (fp64 for fp64 input) also under bf16 autocast; there the products on a GPU take bf16
    operands, accumulate in fp32 and give logits in `logits_dtype`. At most `chunk_tokens` rows of logits a model exist
    at a time (None: as many as `linear_kl` finds best). The gradient is taken with the loss and `backward` scales it in
    place: call it once.

    Args:
        divergence: forward_kl (teacher to student), reverse_kl or jsd (with `beta`); see `linear_kl`.
        step: how the tokens add up to the optimiser step's loss, see `_shares`: `tokens`, `sequences`, `labels`,
            `ce_weight`, `label_tokens`.
    """
    _check(student_h, student_w, teacher_h, teacher_w, temperature)
    rows = _shares(student_h, (teacher_h,), mask, reduction, **step)
    result = linear_kl(
        rows.student_h,
        student_w,
        rows.teacher[0],
        teacher_w,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
        **rows.weighting(),
    )
    return rows.parts(result)


def top_k_loss(
    student_h: Tensor,
    student_w: Tensor,
    teacher: TopK,
    mask: Tensor | None = None,
    reduction: str = "token_mean",
    temperature: float = 1.0,
    *,
    chunk_tokens: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    **step: Any,
) -> LossParts:
    """As `distillation_loss` with forward KL, to what was kept of a teacher at the same temperature.

    It has one bucket for the tokens that were not kept (`linear_top_k_kl`), and is at most the full divergence.
    `teacher` has the student's positions: `[B, T, k]` and `[B, T, k + 1]`, or `[N, ...]`.
    """
    rows = _shares(student_h, tuple(teacher), mask, reduction, **step)
    result = linear_top_k_kl(
        rows.student_h,
        student_w,
        TopK(*rows.teacher),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        logits_dtype=logits_dtype,
        **rows.weighting(),
    )
    return rows.parts(result)


class _Rows(NamedTuple):
    """The N tokens of a micro-batch, one after the other, and each one's share of the optimiser step's loss."""

    student_h: Tensor
    teacher: tuple[Tensor, ...]
    mask: Tensor
    labels: Tensor | None
    weights: Tensor
    label_weights: Tensor | None
    tokens: int | Tensor
    labelled: int | Tensor

    def weighting(self) -> dict[str, Tensor | None]:
        """Arguments of `linear_kl` and `linear_top_k_kl`."""
        return {name: getattr(self, name) for name in ("weights", "mask", "labels", "label_weights")}

    def parts(self, result: LinearKL) -> LossParts:
        kl_sum = result.divergence.sum(dtype=torch.float64)
        ce_sum = torch.zeros_like(kl_sum) if self.labels is None else result.cross_entropy.sum(dtype=torch.float64)
        return LossParts(result.loss, kl_sum, ce_sum, self.tokens, self.labelled)


def _shares(
    student_h: Tensor,
    teacher: tuple[Tensor, ...],
    mask: Tensor | None,
    reduction: str,
    *,
    tokens: int | Tensor | None = None,
    sequences: int | None = None,
    labels: Tensor | None = None,
    ce_weight: float = 0.0,
    label_tokens: int | Tensor | None = None,
) -> _Rows:
    """Tensors `[B, T, ...]` or `[N, ...]` as rows, with weights that make Σ the loss of the whole optimiser step.

    Args:
        tokens: unmasked tokens of the whole optimiser step, for `token_mean`; default: those given here.
        sequences: sequences of the whole optimiser step, for `batch_sum`; default: B.
        labels: `[B, T]` or `[N]`, the token each position should predict (already shifted), -100 for none.
        label_tokens: labelled tokens of the whole optimiser step, for `token_mean`; default: those given here.

    Raises:
        ValueError: unknown reduction, `batch_sum` of flat input without `sequences`, `ce_weight` without labels.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}: use one of {', '.join(REDUCTIONS)}")
    if ce_weight and labels is None:
        raise ValueError("ce_weight needs labels")
    if reduction == "batch_sum" and sequences is None:
        if student_h.dim() != 3:
            raise ValueError("batch_sum of [N, D] hidden states needs `sequences`, the number of sequences of the step")
        sequences = student_h.shape[0]
    student_h, *teacher = (tensor.flatten(0, -2) for tensor in (student_h, *teacher))
    labels = labels.flatten() if labels is not None and ce_weight else None
    mask = mask.flatten().ne(0) if mask is not None else None
    if mask is not None and not mask.is_cuda:
        # On a CPU rows left out need not be computed; on CUDA choosing them would wait for the device.
        student_h, teacher = student_h[mask], [tensor[mask] for tensor in teacher]
        labels, mask = labels[mask] if labels is not None else None, None
    count = student_h.shape[0] if mask is None else mask.sum()
    labelled = _labelled(labels, mask)
    by_token = reduction == "token_mean"
    kl_divisor = sequences if not by_token else count if tokens is None else tokens
    ce_divisor = sequences if not by_token else labelled if label_tokens is None else label_tokens
    return _Rows(
        student_h,
        tuple(teacher),
        # Given even when nothing is masked: a weight of 0 (ce_weight 1) must not leave a row out of kl_sum.
        mask if mask is not None else student_h.new_ones(student_h.shape[0], dtype=torch.bool),
        labels,
        _share(student_h, 1.0 - ce_weight, kl_divisor),
        _share(student_h, ce_weight, ce_divisor) if labels is not None else None,
        count,
        labelled,
    )


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


def _check(student_h: Tensor, student_w: Tensor, teacher_h: Tensor, teacher_w: Tensor, temperature: float) -> None:
    if student_w.shape[0] != teacher_w.shape[0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {student_w.shape[0]} and {teacher_w.shape[0]} rows; "
            "cut padded rows off the larger head (a padded row has probability too)"
        )
    if student_h.shape[:-1] != teacher_h.shape[:-1]:
        raise ValueError(f"student and teacher positions differ: {tuple(student_h.shape)}, {tuple(teacher_h.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
