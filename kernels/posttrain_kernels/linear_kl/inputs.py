"""What `linear_kl` accepts, and the per-row tensors it works with."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain_kernels.linear_kl.reference import DIVERGENCES, IGNORE

# Below, gradients of reverse KL and jsd are fp32's rounding of a large gap over a small temperature, and below 4e-5 the
# kernel's stand-in for entries beyond the end overflows. Above, a KL near var/2T² sinks into fp32's rounding.
TEMPERATURES = (0.01, 100.0)


def per_row(
    hidden: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    label_weights: Tensor | None,
    wide: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(rows to compute or None for all, weights, label weights), the weights 0 where a row is left out."""
    keep = mask.ne(0) if mask is not None else None
    if keep is None and weights is not None:
        keep = weights.ne(0)
        if labels is not None:
            counts = labels.ne(IGNORE)
            keep = keep | (counts if label_weights is None else counts & label_weights.ne(0))

    def column(given: Tensor | None) -> Tensor:
        given = hidden.new_ones(hidden.shape[0], dtype=wide) if given is None else given.detach().to(wide).contiguous()
        return given if keep is None else torch.where(keep, given, 0.0)

    return keep, column(weights), column(label_weights) if labels is not None else None


def check(
    student_h: Tensor,
    student_w: Tensor,
    teacher_h: Tensor,
    teacher_w: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    logits_dtype: torch.dtype | None,
) -> None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"unknown divergence {divergence!r}: use one of {', '.join(DIVERGENCES)}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"jsd needs beta between 0 and 1, not {beta}; its limits are forward_kl and reverse_kl, rescaled"
        )
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ValueError(f"temperature must be from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}, not {temperature}")
    if logits_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be float32 or bfloat16, not {logits_dtype}")
    shapes = [tuple(tensor.shape) for tensor in (student_h, student_w, teacher_h, teacher_w)]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"hidden states must be [N, D] and heads [V, D], not {shapes}")
    for name, hidden, head in (("student", shapes[0], shapes[1]), ("teacher", shapes[2], shapes[3])):
        if hidden[1] != head[1]:
            raise ValueError(f"the {name}'s hidden states have width {hidden[1]}, its head {head[1]}")
    if shapes[0][0] != shapes[2][0]:
        raise ValueError(f"student and teacher positions differ: {shapes[0][0]} and {shapes[2][0]}")
    if shapes[1][0] != shapes[3][0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {shapes[1][0]} and {shapes[3][0]} rows; "
            "cut padded rows off the larger head (a padded row has probability too)"
        )


def check_rows(hidden: Tensor, **rows: Tensor | None) -> None:
    if rows["label_weights"] is not None and rows["labels"] is None:
        raise ValueError("label_weights need labels")
    for name, row in rows.items():
        if row is not None and row.shape != hidden.shape[:1]:
            raise ValueError(f"{name} must have shape [{hidden.shape[0]}], not {list(row.shape)}")
