"""Random hidden states and vocabulary heads, for the benchmarks of losses over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

QUICK = (96, 1000, 64)
SIZES = ((8192, 128256, 2048), (16384, 49152, 576))
"""(tokens, vocabulary, width): a Llama-3.2-1B head, and SmolLM2-135M's at 8 x 2,048 tokens."""

LOGIT_STD = 3.0
"""Spread of the logits, about that of a trained model: KL and entropy are then neither tiny nor saturated."""


@dataclass(frozen=True)
class Heads:
    """Student and teacher as leaves: hidden states [N, D], heads [V, D]; the student's want gradients."""

    student_h: Tensor
    student_w: Tensor
    teacher_h: Tensor
    teacher_w: Tensor

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.student_h, self.student_w


def sizes(quick: bool) -> tuple[tuple[int, int, int], ...]:
    """(tokens, vocabulary, width) of the cases to run."""
    return (QUICK,) if quick else SIZES


def dtype_for(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, where bf16 is slow and not what the CPU path is for."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_heads(tokens: int, vocab: int, width: int, device: torch.device) -> Heads:
    """A teacher, and a student correlated with it by 0.8 in both its hidden states and its head."""
    dtype = dtype_for(device)

    def pair(rows: int, scale: float) -> tuple[Tensor, Tensor]:
        teacher = torch.randn(rows, width, device=device) * scale
        student = 0.8 * teacher + 0.6 * scale * torch.randn(rows, width, device=device)
        return student.to(dtype).requires_grad_(), teacher.to(dtype)

    student_h, teacher_h = pair(tokens, 1.0)
    student_w, teacher_w = pair(vocab, LOGIT_STD / width**0.5)
    return Heads(student_h, student_w, teacher_h, teacher_w)


def shape_text(tokens: int, vocab: int, width: int) -> str:
    """The CSV's shape column."""
    return f"N{tokens} V{vocab} D{width}"
