"""`rms_norm` on CPU: the model's own norm, and the contract of the residual stream."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.rms_norm import rms_norm

from posttrain.models.upcycled.norm_upcycled import UpcycledRMSNorm


def module(width, dtype):
    norm = UpcycledRMSNorm(width, 1e-5).to(dtype)
    norm.weight.data.copy_(randn(width, seed=1))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_is_the_models_norm_bit_for_bit(dtype):
    norm, x = module(48, dtype), randn(2, 3, 48, seed=0, dtype=dtype)
    y, stream = rms_norm(x, norm.weight, 1e-5)
    assert torch.equal(y, norm(x)) and stream is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_residual_is_added_and_rounded_as_between_two_sublayers(dtype):
    norm = module(48, dtype)
    x, residual = randn(3, 48, seed=0, dtype=dtype), randn(3, 48, seed=2, scale=5.0, dtype=dtype)
    y, stream = rms_norm(x, norm.weight, 1e-5, residual)
    assert torch.equal(stream, residual + x) and torch.equal(y, norm(residual + x))


def test_fp64_is_computed_in_fp64():
    x, weight, residual = (
        randn(*shape, seed=seed, dtype=torch.float64) for seed, shape in enumerate([(3, 7), (7,), (3, 7)])
    )
    y, stream = rms_norm(x, weight, 0.1, residual)
    expected = weight * stream / ((stream * stream).sum(-1, keepdim=True) / 7 + 0.1).sqrt()
    assert relative_error(y, expected) < 1e-15 and torch.equal(stream, x + residual)


def test_an_fp32_stream_keeps_its_dtype_under_bf16_sublayers():
    x, weight = randn(3, 8, seed=0, dtype=torch.bfloat16), randn(8, seed=1, dtype=torch.bfloat16)
    y, stream = rms_norm(x, weight, 1e-5, randn(3, 8, seed=2))
    assert (y.dtype, stream.dtype) == (torch.bfloat16, torch.float32)


def test_errors():
    x = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="no gradient"):
        rms_norm(x, torch.ones(4, requires_grad=True), 1e-5)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(3), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, torch.ones(4), 1e-5, torch.ones(1, 4))
