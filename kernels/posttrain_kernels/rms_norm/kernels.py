"""RMSNorm with residual addition in Triton: a few rows a program, one read and one write of each tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_own_device
from ..inference import unit_stride
from ..sizes import cdiv, next_power_of_2

ELEMENTS = 2048
"""Elements a program holds at most before it takes a single row."""


@on_own_device
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The Triton code behind `rms_norm`; same contract, checks done."""
    shape, width = x.shape, x.shape[-1]
    flat = unit_stride(x.reshape(-1, width))
    stream = flat if residual is None else unit_stride(residual.reshape(-1, width))
    y = torch.empty(shape, device=x.device, dtype=torch.promote_types(x.dtype, weight.dtype))
    summed = x if residual is None else torch.empty(shape, device=x.device, dtype=residual.dtype)
    block = next_power_of_2(width)
    group = rows_per_program(flat.shape[0], block)
    if y.numel():
        _rms_norm_kernel[(cdiv(flat.shape[0], group),)](
            flat,
            stream,
            weight.contiguous(),
            y,
            summed,
            flat.shape[0],
            flat.stride(0),
            stream.stride(0),
            width,
            eps,
            RESIDUAL=residual is not None,
            ROWS=group,
            BLOCK=block,
            num_warps=min(8, max(1, group * block // 256)),
        )
    return y, summed


def rows_per_program(rows: int, block: int) -> int:
    """Rows a program takes: one while they are few (a program each fills the card), more where narrow rows abound."""
    group = max(1, ELEMENTS // block)
    while group > 1 and rows < group * 512:
        group //= 2
    return group


@triton.jit
def _rms_norm_kernel(
    p_x,
    p_residual,
    p_weight,
    p_y,
    p_summed,
    rows,
    x_stride,
    residual_stride,
    width,
    eps,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    valid = (row < rows) & (column < width)
    b_x = tl.load(p_x + row * x_stride + column, mask=valid, other=0.0)
    b_weight = tl.load(p_weight + column, mask=column < width, other=0.0)
    b_stream = b_x
    if RESIDUAL:
        b_residual = tl.load(p_residual + row * residual_stride + column, mask=valid, other=0.0)
        b_stream = (b_x.to(tl.float32) + b_residual.to(tl.float32)).to(b_residual.dtype)
        tl.store(p_summed + row * width + column, b_stream, mask=valid)
    b_wide = b_stream.to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_wide * b_wide, axis=1) / width + eps)
    # Rounded to x's dtype before the weight, as eager does.
    b_normal = (b_wide * b_scale[:, None]).to(b_x.dtype).to(tl.float32)
    b_y = b_normal * b_weight.to(tl.float32)
    tl.store(p_y + row * width + column, b_y.to(p_y.dtype.element_ty), mask=valid)
