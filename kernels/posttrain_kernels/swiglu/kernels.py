"""SiLU gate in Triton: each half is read once, the product written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import on_own_device
from ..inference import unit_stride
from ..sizes import cdiv

BLOCK = 512
"""Columns of a program; small, so that a batch of 64 rows still covers the card."""


@on_own_device
def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """The Triton code behind `silu_mul`; same contract, checks done."""
    width = gate_up.shape[-1] // 2
    flat = unit_stride(gate_up.reshape(-1, 2 * width))
    out = torch.empty(*gate_up.shape[:-1], width, device=gate_up.device, dtype=gate_up.dtype)
    if out.numel():
        grid = (flat.shape[0], cdiv(width, BLOCK))
        _silu_mul_kernel[grid](flat, out, flat.stride(0), width, BLOCK=BLOCK, num_warps=2)
    return out


@triton.jit
def _silu_mul_kernel(p_gate_up, p_out, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < width
    p_gate = p_gate_up + row * stride + column
    b_gate = tl.load(p_gate, mask=valid, other=0.0)
    b_up = tl.load(p_gate + width, mask=valid, other=0.0).to(tl.float32)
    b_wide = b_gate.to(tl.float32)
    b_silu = (b_wide / (1.0 + tl.exp(-b_wide))).to(b_gate.dtype).to(tl.float32)
    tl.store(p_out + row * width + column, (b_silu * b_up).to(b_gate.dtype), mask=valid)
