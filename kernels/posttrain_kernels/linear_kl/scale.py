"""In-place scaling by a number that only the device knows, and that is nearly always 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posttrain_kernels.dispatch import on_own_device
from posttrain_kernels.sizes import cdiv

BLOCK = 4096
PROGRAMS = 1024
"""A few for each multiprocessor; they stride over the tensor, so that looking at a factor of 1 costs microseconds."""


@on_own_device
def scale_in_place(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor *= factor` for a contiguous tensor and a scalar tensor; where the factor is 1 no memory is touched.

    The loss's incoming gradient is 1 in training, and a pass over the head's gradient is a fortieth of the operator.
    """
    count = tensor.numel()
    if count:
        grid = (min(PROGRAMS, cdiv(count, BLOCK)),)
        _scale_kernel[grid](tensor, factor.reshape(1), count, BLOCK=BLOCK, num_warps=8)
    # A kernel's write is invisible to autograd; a second backward through the scaled tensor must stay an error.
    torch.autograd.graph.increment_version(tensor)
    return tensor


@triton.jit
def _scale_kernel(p_tensor, p_factor, count, BLOCK: tl.constexpr):
    factor = tl.load(p_factor).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < count:
            at = start + tl.arange(0, BLOCK)
            value = tl.load(p_tensor + at, mask=at < count, other=0.0).to(tl.float32)
            tl.store(p_tensor + at, (value * factor).to(p_tensor.dtype.element_ty), mask=at < count)
            start += step
