"""The loss of one layer against its counterpart (Zebra-Llama, arXiv 2505.17272, and its released code)."""

from __future__ import annotations

import torch
from torch import Tensor

LOSSES = ("l2", "mse")


def layer_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], kind: str = "l2") -> Tensor:
    """Sum over tokens of how far a layer's mixer and the layer itself are from the teacher's; a scalar, fp32 or wider.

    - `l2` Σ ‖out − out'‖₂ + ‖mix − mix'‖₂, the norms not squared: what the released code trains with
    - `mse` Σ mean((out − out')²) + mean((mix − mix')²), means over the width: what the paper calls it

    Args:
        student, teacher: the mixer's output and the layer's, each [B, T, D]; of the last layer behind the final norm.

    Raises:
        ValueError: an unknown kind, or shapes that differ (they would broadcast).
    """
    if kind not in LOSSES:
        raise ValueError(f"loss {kind!r} is not one of {', '.join(LOSSES)}")
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(f"outputs {tuple(ours.shape)} and {tuple(theirs.shape)} do not match")
        wide = torch.promote_types(torch.promote_types(ours.dtype, theirs.dtype), torch.float32)
        difference = ours.to(wide) - theirs.to(wide)
        if kind == "l2":
            total = total + torch.linalg.vector_norm(difference, dim=-1).sum()
        else:
            total = total + difference.square().mean(dim=-1).sum()
    return total
