"""The two operators in Triton: a head of a row a program, one read and one write of everything."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_own_device
from ..inference import unit_stride
from ..sizes import next_power_of_2


@on_own_device
def conv_step_triton(
    drive: Tensor,
    columns: Tensor,
    taps: Tensor,
    bias: Tensor,
    heads: tuple[int, int, int],
    *,
    repeats: int,
    silu: bool,
    b_norm: Tensor | None,
    c_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The Triton code behind `conv_step`; same contract, checks done."""
    rows, (_, channels, kernel) = drive.shape[0], columns.shape
    width = channels // sum(heads)
    drive = unit_stride(drive)
    weights = [weight for weight in (b_norm, c_norm) if weight is not None]
    kind = torch.promote_types(drive.dtype, weights[0].dtype) if weights else drive.dtype
    out = torch.empty(rows, sum(heads), width, device=drive.device, dtype=kind)
    if not out.numel():
        return out
    block, window = next_power_of_2(width), next_power_of_2(kernel)
    _conv_step_kernel[(rows, sum(heads))](
        drive, columns, taps.contiguous(), bias.contiguous(),
        bias if b_norm is None else b_norm.contiguous(), bias if c_norm is None else c_norm.contiguous(), out,
        drive.stride(0), width, eps, OF_X=heads[0], OF_B=heads[1], REPEATS=repeats, K=kernel, SILU=silu,
        B_NORM=b_norm is not None, C_NORM=c_norm is not None, BLOCK=block, WINDOW=window,
        num_warps=max(1, min(4, block * window // 256)),
    )  # fmt: skip
    return out


@on_own_device
def gated_norm_triton(y: Tensor, z: Tensor, weight: Tensor | None, eps: float, width: int) -> Tensor:
    """The Triton code behind `gated_norm`; same contract, checks done."""
    y, z = unit_stride(y), unit_stride(z)
    kind = z.dtype if weight is None else torch.promote_types(z.dtype, weight.dtype)
    out = torch.empty(z.shape, device=z.device, dtype=kind)
    if out.numel():
        block = next_power_of_2(width)
        _gated_norm_kernel[(z.shape[0], z.shape[1] // width)](
            y, z, z if weight is None else weight.contiguous(), out, y.stride(0), z.stride(0), z.shape[1], width, eps,
            NORM=weight is not None, BLOCK=block, num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return out


@triton.jit
def _conv_step_kernel(
    p_drive, p_columns, p_taps, p_bias, p_b_norm, p_c_norm, p_out, drive_row, width, eps,
    OF_X: tl.constexpr, OF_B: tl.constexpr, REPEATS: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr,
    B_NORM: tl.constexpr, C_NORM: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # The head of the projection that is repeated here; those of C are not.
    shared: tl.constexpr = OF_X + OF_B
    source = head
    if REPEATS > 1:
        source = tl.where(head < shared, head // REPEATS, head - shared + shared // REPEATS)
    channel, tap = tl.arange(0, BLOCK), tl.arange(0, WINDOW)[None, :]
    inside = channel < width
    b_drive = tl.load(p_drive + row * drive_row + source * width + channel, mask=inside, other=0.0)
    at = (head * width + channel)[:, None] * K + tap
    p_window = p_columns + row * (tl.num_programs(1) * width * K) + at
    b_window = tl.load(p_window + 1, mask=inside[:, None] & (tap < K - 1), other=0.0)
    b_window = tl.where(tap == K - 1, b_drive[:, None].to(b_window.dtype), b_window)
    # A column is written where another thread has read it.
    tl.debug_barrier()
    tl.store(p_window, b_window, mask=inside[:, None] & (tap < K))
    b_taps = tl.load(p_taps + at, mask=inside[:, None] & (tap < K), other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + head * width + channel, mask=inside, other=0.0).to(tl.float32)
    b_mixed = tl.sum(b_window.to(tl.float32) * b_taps, axis=1) + b_bias
    b_mixed = b_mixed.to(b_drive.dtype).to(tl.float32)
    if SILU:
        b_mixed = (b_mixed * tl.sigmoid(b_mixed)).to(b_drive.dtype).to(tl.float32)
    if B_NORM:
        if (head >= OF_X) & (head < shared):
            b_mixed = _normed(b_mixed, p_b_norm, channel, inside, width, eps, b_drive.dtype)
    if C_NORM:
        if head >= shared:
            b_mixed = _normed(b_mixed, p_c_norm, channel, inside, width, eps, b_drive.dtype)
    p_target = p_out + (row * tl.num_programs(1) + head) * width + channel
    tl.store(p_target, b_mixed.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_norm_kernel(
    p_y, p_z, p_weight, p_out, y_row, z_row, out_row, width, eps, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * width
    channel = tl.arange(0, BLOCK)
    inside = channel < width
    b_y = tl.load(p_y + row * y_row + first + channel, mask=inside, other=0.0).to(tl.float32)
    b_z = tl.load(p_z + row * z_row + first + channel, mask=inside, other=0.0)
    b_out = b_y * (b_z.to(tl.float32) * tl.sigmoid(b_z.to(tl.float32)))
    if NORM:
        b_out = _normed(b_out, p_weight + first, channel, inside, width, eps, b_z.dtype)
    tl.store(p_out + row * out_row + first + channel, b_out.to(p_out.dtype.element_ty), mask=inside)


@triton.jit
def _normed(b_x, p_weight, channel, inside, width, eps, TYPE: tl.constexpr):
    """x over its root mean square, rounded before the weight as eager does; channels outside are zero."""
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / width + eps)
    b_weight = tl.load(p_weight + channel, mask=inside, other=0.0).to(tl.float32)
    return (b_x * b_scale).to(TYPE).to(tl.float32) * b_weight
