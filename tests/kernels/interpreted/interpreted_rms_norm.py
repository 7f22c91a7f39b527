"""The Triton RMSNorm against its reference, fp32, at odd widths and poisoned outputs."""

from __future__ import annotations

import pytest
from kernel_cases import randn, relative_error
from posttrain_kernels.rms_norm import rms_norm, rms_norm_reference

pytestmark = pytest.mark.usefixtures("poison_empty")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(3, 576), (1, 1), (2, 5, 17), (1100, 3)])
def test_matches_the_reference(shape, with_residual):
    x, weight = randn(*shape, seed=0), randn(shape[-1], seed=1)
    residual = randn(*shape, seed=2, scale=3.0) if with_residual else None
    y, stream = rms_norm(x, weight, 1e-5, residual)
    y_reference, stream_reference = rms_norm_reference(x, weight, 1e-5, residual)
    assert relative_error(y, y_reference) < 1e-6
    assert relative_error(stream, stream_reference) < 1e-7
    assert (stream is x) == (not with_residual)


def test_a_strided_weight():
    x, weight = randn(4, 24, seed=0), randn(48, seed=1)[::2]
    y, _ = rms_norm(x, weight, 1e-6)
    assert relative_error(y, rms_norm_reference(x, weight, 1e-6)[0]) < 1e-6


def test_reads_a_part_of_a_wider_tensor():
    """The query's compression of latent attention is a slice: rows with a stride above their width."""
    wide = randn(4, 40, seed=0)
    weight = randn(24, seed=1)
    y, _ = rms_norm(wide[:, 8:32], weight, 1e-6)
    assert relative_error(y, rms_norm_reference(wide[:, 8:32], weight, 1e-6)[0]) < 1e-6
