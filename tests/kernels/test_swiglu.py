"""`silu_mul` on CPU: the two projections of a feed-forward layer packed into one."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn
from posttrain_kernels.swiglu import silu_mul
from torch import nn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_packed_weights_give_the_feed_forward_layers_product(dtype):
    x, gate, up = randn(3, 8, seed=0, dtype=dtype), randn(6, 8, seed=1, dtype=dtype), randn(6, 8, seed=2, dtype=dtype)
    packed = nn.functional.linear(x, torch.cat((gate, up)))
    first, second = packed[:, :6], packed[:, 6:]
    assert torch.equal(silu_mul(packed), nn.functional.silu(first) * second)
    assert torch.allclose(silu_mul(packed), nn.functional.silu(x @ gate.T) * (x @ up.T), atol=0, rtol=0.05)


def test_errors():
    with pytest.raises(RuntimeError, match="no gradient"):
        silu_mul(torch.ones(2, 4, requires_grad=True))
    with pytest.raises(ValueError, match="halves"):
        silu_mul(torch.ones(2, 5))
