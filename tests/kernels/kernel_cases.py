"""What the kernels' tests share: the CUDA mark, poisoned buffers and the relative error they are judged by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """A buffer full of NaN: an element a kernel forgets to write, or reads too early, shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ in fp64; NaN when anything is NaN, and so never below a tolerance."""
    out, reference = out.detach().double().cpu(), reference.detach().double().cpu()
    norm = reference.norm()
    return float((out - reference).norm() / (norm if norm > 0 else 1.0))


def randn(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers of a seed, drawn in fp64 and rounded: every dtype sees the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
