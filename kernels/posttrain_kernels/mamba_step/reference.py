"""The two operators in plain torch: the contract, and what the CPU runs. Legend: see `op.py`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..inference import compute_dtype
from ..rms_norm import rms_norm_reference


def conv_step_reference(
    drive: Tensor,
    columns: Tensor,
    taps: Tensor,
    bias: Tensor,
    heads: tuple[int, int, int],
    *,
    repeats: int = 1,
    silu: bool = True,
    b_norm: Tensor | None = None,
    c_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`conv_step`, rounded as a convolution, an activation and `UpcycledRMSNorm` one after the other do it."""
    of_x, of_b, _ = heads
    width = columns.shape[1] // sum(heads)
    if repeats > 1:
        shared = (of_x + of_b) // repeats * width
        narrow, own = drive.split((shared, drive.shape[1] - shared), dim=-1)
        narrow = narrow.unflatten(-1, (-1, width)).repeat_interleave(repeats, dim=-2).flatten(-2)
        drive = torch.cat((narrow, own), dim=-1)
    window = columns[: len(drive)]
    window.copy_(torch.cat((window[..., 1:], drive[..., None]), dim=-1))
    wide = compute_dtype(drive)
    mixed = ((window.to(wide) * taps.to(wide)).sum(-1) + bias.to(wide)).to(drive.dtype)
    mixed = F.silu(mixed) if silu else mixed
    parts = list(mixed.unflatten(-1, (-1, width)).split(heads, dim=-2))
    for place, weight in ((1, b_norm), (2, c_norm)):
        if weight is not None:
            parts[place] = rms_norm_reference(parts[place], weight, eps)[0]
    return torch.cat(parts, dim=-2)


def gated_norm_reference(y: Tensor, z: Tensor, weight: Tensor | None, eps: float, width: int) -> Tensor:
    """`gated_norm`; the gated product stays in fp32 (fp64) up to the norm, as in `UpcycledGatedRMSNorm`."""
    wide = compute_dtype(z)
    gated = y.to(wide) * F.silu(z.to(wide))
    if weight is None:
        return gated.to(z.dtype)
    heads = gated.unflatten(-1, (-1, width))
    normal = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + eps)
    return normal.flatten(-2).to(z.dtype) * weight
