"""The Triton SiLU gate against its reference, fp32."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.swiglu import silu_mul, silu_mul_reference

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("shape", [(3, 2 * 1536), (1, 2), (2, 3, 2 * 513), (5, 2 * 77)])
def test_matches_the_reference(shape):
    gate_up = randn(*shape, seed=0, scale=4.0)
    assert relative_error(silu_mul(gate_up), silu_mul_reference(gate_up)) < 1e-6


def test_large_gates_neither_overflow_nor_vanish():
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    assert silu_mul(gate_up).tolist() == [[0.0, pytest.approx(0.0, abs=1e-30), 100.0, 1e4]]
