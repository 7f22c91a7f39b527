"""The steps around `ssd_step` on CPU: the model's own convolution, norms and gate, and what is refused."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.mamba_step import conv_step, gated_norm
from posttrain_kernels.ssd_scan import ssd_step
from torch.nn import functional as F

from posttrain.models.upcycled.norm_upcycled import UpcycledGatedRMSNorm, UpcycledRMSNorm

HEADS, WIDTH = (2, 2, 4), 6
CHANNELS = WIDTH * sum(HEADS)


def norm(seed, dtype):
    module = UpcycledRMSNorm(WIDTH, 1e-5).to(dtype)
    module.weight.data.copy_(randn(WIDTH, seed=seed))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 4, 6])
@torch.no_grad()
def test_token_by_token_it_is_the_convolution_with_its_norms(kernel, dtype):
    rows, tokens = 3, 5
    drive = randn(rows, tokens, CHANNELS, seed=0, dtype=dtype)
    taps, bias = randn(CHANNELS, kernel, seed=1, dtype=dtype), randn(CHANNELS, seed=2, dtype=dtype)
    b_norm, c_norm = norm(3, dtype), norm(4, dtype)
    mixed = F.conv1d(F.pad(drive.transpose(1, 2), (kernel - 1, 0)), taps[:, None], bias, groups=CHANNELS)
    x, b, c = F.silu(mixed.transpose(1, 2)).unflatten(-1, (-1, WIDTH)).split(HEADS, dim=-2)
    expected = torch.cat((x, b_norm(b), c_norm(c)), dim=-2)
    columns = torch.zeros(rows + 1, CHANNELS, kernel, dtype=dtype)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for token in range(tokens):
        norms = dict(b_norm=b_norm.weight, c_norm=c_norm.weight, eps=1e-5)
        found = conv_step(drive[:, token], columns, taps, bias, HEADS, **norms)
        assert found.dtype == dtype and relative_error(found, expected[:, token]) < tolerance
    assert torch.equal(columns[:rows, :, -1], drive[:, -1]) and not columns[rows].any()


@torch.no_grad()
def test_what_is_repeated_before_the_convolution_has_taps_of_its_own():
    heads, narrow = (4, 4, 4), WIDTH * 2
    drive = randn(3, 2 * narrow + 4 * WIDTH, seed=0)
    channels = WIDTH * 12
    taps, bias, columns = randn(channels, 4, seed=1), randn(channels, seed=2), randn(3, channels, 4, seed=3)
    parts = drive.split((narrow, narrow, 4 * WIDTH), dim=-1)
    wide = [part.unflatten(-1, (-1, WIDTH)).repeat_interleave(2, dim=1).flatten(1) for part in parts[:2]]
    own = columns.clone()
    found = conv_step(drive, columns, taps, bias, heads, repeats=2, silu=False)
    expected = conv_step(torch.cat((*wide, parts[2]), dim=-1), own, taps, bias, heads, silu=False)
    assert torch.equal(found, expected) and torch.equal(columns, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalises", [True, False])
@torch.no_grad()
def test_the_gate_is_the_models_bit_for_bit(normalises, dtype):
    module = UpcycledGatedRMSNorm(24, WIDTH, 1e-5, normalises=normalises).to(dtype)
    if normalises:
        module.weight.data.copy_(randn(24, seed=2))
    y, z = randn(5, 24, seed=0, dtype=dtype), randn(5, 24, seed=1, dtype=dtype)
    found = gated_norm(y, z, module.weight if normalises else None, 1e-5, WIDTH)
    assert torch.equal(found, module(y, z))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_takes_step_sizes_as_the_projection_gives_them(dtype):
    x, b, c = (
        randn(2, 2, 4, seed=0, dtype=dtype),
        randn(2, 2, 3, seed=1, dtype=dtype),
        randn(2, 4, 3, seed=2, dtype=dtype),
    )
    dt, bias, a = randn(2, 4, seed=3, scale=9.0, dtype=dtype), randn(4, seed=4), -randn(4, seed=5).exp()
    state = randn(2, 4, 4, 3, seed=6, dtype=torch.promote_types(dtype, torch.float32))
    other = state.clone()
    found = ssd_step(x, dt, a, b, c, state, dt_bias=bias, dt_softplus=True)
    sizes = F.softplus(dt.to(state.dtype) + bias)
    assert torch.equal(found, ssd_step(x, sizes, a, b, c, other)) and torch.equal(state, other)


def test_errors():
    drive, columns = torch.ones(2, CHANNELS), torch.ones(2, CHANNELS, 4)
    taps, bias = torch.ones(CHANNELS, 4), torch.ones(CHANNELS)
    with pytest.raises(RuntimeError, match="no gradient"):
        conv_step(drive, columns, taps.requires_grad_(), bias, HEADS)
    taps = taps.detach()
    for match, arguments in {
        "are not .B, C, K.": (drive, torch.ones(2, CHANNELS + 1, 4), taps, bias, HEADS),
        "dense": (drive, torch.ones(2, 4, CHANNELS).transpose(1, 2), taps, bias, HEADS),
        "does not fit columns": (torch.ones(3, CHANNELS), columns, taps, bias, HEADS),
        "taps": (drive, columns, taps[:, 1:], bias, HEADS),
    }.items():
        with pytest.raises(ValueError, match=match):
            conv_step(*arguments)
    with pytest.raises(ValueError, match="b_norm"):
        conv_step(drive, columns, taps, bias, HEADS, b_norm=torch.ones(WIDTH + 1))
    with pytest.raises(ValueError, match="times as many"):
        conv_step(drive, columns, taps, bias, HEADS, repeats=3)
    with pytest.raises(ValueError, match="heads of 5"):
        gated_norm(torch.ones(2, 24), torch.ones(2, 24), None, 1e-5, 5)
    with pytest.raises(ValueError, match="weight"):
        gated_norm(torch.ones(2, 24), torch.ones(2, 24), torch.ones(6), 1e-5, 6)
    state = torch.zeros(2, 4, 4, 3)
    step = torch.ones(2, 2, 4), torch.ones(2, 4), -torch.ones(4), torch.ones(2, 2, 3), torch.ones(2, 4, 3), state
    with pytest.raises(ValueError, match="dt_bias"):
        ssd_step(*step, dt_bias=torch.ones(3))
