"""Root-mean-square normalisation, plain and gated."""

from __future__ import annotations

import torch
from torch import nn


def at_least_fp32(x: torch.Tensor) -> torch.dtype:
    """The type to compute in: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


class UpcycledRMSNorm(nn.Module):
    """`weight · x / sqrt(mean(x²) + eps)` over the last dimension, in fp32 or wider (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.to(at_least_fp32(hidden_states))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class UpcycledGatedRMSNorm(nn.Module):
    """`weight · norm(y · silu(z))`, the root mean square taken over groups of `group_size` elements (Mamba-2).

    The gate comes before the norm. Without `normalises` it is the gate alone, and there is no weight.
    """

    def __init__(self, width: int, group_size: int, eps: float, normalises: bool = True) -> None:
        super().__init__()
        self.group_size, self.variance_epsilon = group_size, eps
        if normalises:
            self.weight = nn.Parameter(torch.ones(width))
        else:
            self.register_parameter("weight", None)

    def forward(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        wide = at_least_fp32(z)
        gated = y.to(wide) * nn.functional.silu(z.to(wide))
        if self.weight is None:
            return gated.to(z.dtype)
        groups = gated.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * groups.flatten(-2).to(z.dtype)
