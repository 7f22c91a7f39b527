"""What the operators of decoding share: when their Triton code runs, and that none of them records gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def use_inference_kernel(*tensors: Tensor | None) -> bool:
    """`use_triton`, except for fp64: the kernels compute in fp32, and whoever passes fp64 wants all of it."""
    return use_triton(*tensors) and not any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)


def refuse_gradients(operator: str, *tensors: Tensor | None) -> None:
    """RuntimeError where autograd would have to record the operator: it has no backward."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{operator} is for inference and has no gradient: call it under torch.no_grad()")


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy: the kernels take strides for the others."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 stays, everything else is computed in fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dense_width(cache: Tensor) -> Tensor:
    """The cache itself; ValueError where its last dimension has gaps, since a copy would lose what is written to it."""
    if cache.stride(-1) != 1:
        raise ValueError("the last dimension of a cache must be dense")
    return cache
