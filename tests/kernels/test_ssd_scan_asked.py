"""Kernels that no GPU has run yet are used where they are asked for."""

from __future__ import annotations

import pytest
import torch
from posttrain_kernels.ssd_scan import triton_scan


def test_on_a_gpu_the_kernels_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "use_triton", lambda *tensors: True)
    x, dt, a, b = torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4), torch.zeros(4), torch.zeros(1, 2, 4, 16)
    for value, expected in ((None, False), ("torch", False), ("triton", True)):
        monkeypatch.delenv(triton_scan.ASKED, raising=False)
        if value is not None:
            monkeypatch.setenv(triton_scan.ASKED, value)
        assert triton_scan.supports_scan(x, dt, a, b, b, None, None) is expected
        state = torch.zeros(1, 4, 16, 16)
        assert triton_scan.supports_step(x[:, 0], dt[:, 0], a, b[:, 0], b[:, 0], state, None) is expected
