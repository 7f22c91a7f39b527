"""RMSNorm in plain torch: the contract, and what the CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference import compute_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(weight · r / sqrt(mean(r²) + eps), r)` with r = x + residual, over the last dimension; r is x without residual.

    Rounded as LlamaRMSNorm does it (transformers): r is kept in residual's dtype, normalised in fp32, cast to x's dtype
    and then multiplied by the weight.
    """
    summed = x if residual is None else (x + residual).to(residual.dtype)
    wide = summed.to(compute_dtype(summed))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype), summed
