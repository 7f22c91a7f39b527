"""The Triton code around `ssd_step` against its reference, fp32, at odd widths and poisoned outputs."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.mamba_step import conv_step, conv_step_reference, gated_norm, gated_norm_reference
from posttrain_kernels.ssd_scan import ssd_step
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("norms", [(), ("b_norm", "c_norm"), ("c_norm",)])
@pytest.mark.parametrize("kernel", [1, 4, 6])
@pytest.mark.parametrize("repeats", [1, 2])
def test_the_convolution_matches_its_reference(repeats, kernel, norms):
    heads, width = (4, 4, 6), 5
    channels = width * sum(heads)
    own = ((heads[0] + heads[1]) // repeats + heads[2]) * width
    drive = randn(3, own + 9, seed=0)[:, 4 : 4 + own]  # a slice of the projection
    taps, bias, columns = randn(channels, kernel, seed=1), randn(channels, seed=2), randn(4, channels, kernel, seed=3)
    options = dict(repeats=repeats, silu=kernel != 1, eps=1e-5)
    options |= {name: randn(width, seed=seed) for seed, name in enumerate(norms, 4)}
    other = columns.clone()
    for step in range(3):
        found = conv_step(drive + step, columns, taps, bias, heads, **options)
        expected = conv_step_reference(drive + step, other, taps, bias, heads, **options)
        assert relative_error(found, expected) < 1e-6 and torch.equal(columns, other)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 6, 64])
def test_the_gate_matches_its_reference(width, weighted):
    y, z = randn(3, 4 * width, seed=0), randn(3, 9 * width, seed=1)[:, width : 5 * width]
    weight = randn(4 * width, seed=2) if weighted else None
    found = gated_norm(y, z, weight, 1e-5, width)
    assert relative_error(found, gated_norm_reference(y, z, weight, 1e-5, width)) < 1e-6


@pytest.mark.parametrize("softplus", [False, True])
def test_a_step_takes_step_sizes_as_the_projection_gives_them(softplus):
    x, b, c = randn(2, 2, 4, seed=0), randn(2, 2, 3, seed=1), randn(2, 4, 3, seed=2)
    # From where exp(dt) is lost beside 1 to where softplus is the identity.
    dt = torch.tensor([[-40.0, -17.0, -9.0, -1.0], [0.5, 8.0, 19.0, 25.0]])
    dt, bias, a = dt if softplus else dt.abs(), 0.1 * randn(4, seed=4).abs(), -0.1 * randn(4, seed=5).exp()
    state = torch.zeros(2, 4, 4, 3)
    ssd_step(x, dt, a, b, c, state, dt_bias=bias, dt_softplus=softplus)
    sizes = (dt + bias).double()
    sizes = F.softplus(sizes) if softplus else sizes
    values = x.double().repeat_interleave(2, dim=1)[..., None] * b.double().repeat_interleave(2, dim=1)[:, :, None]
    expected = sizes[..., None, None] * values
    assert ((state - expected).abs() / expected.abs()).max() < 1e-5
