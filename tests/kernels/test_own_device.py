"""Triton launches on the current device: operators make that of their tensors the current one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import relative_error, requires_cuda
from posttrain_kernels.dispatch import on_own_device
from posttrain_kernels.linear_kl import linear_kl, linear_kl_reference
from posttrain_kernels.rms_norm import rms_norm, rms_norm_reference
from posttrain_kernels.ssd_scan import ssd_scan, ssd_step, ssd_step_reference
from posttrain_kernels.ssd_scan.torch_scan import chunked_scan
from posttrain_kernels.swiglu import silu_mul, silu_mul_reference
from ssd_scan_cases import inputs
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current device, the first of two that a machine without any makes believe it has."""
    stack = [0]

    @contextlib.contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        stack.append(chosen.index)
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: stack[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


@pytest.mark.parametrize(("on", "launched_on"), [("cuda:0", 0), ("cuda:1", 1), ("cpu", 0)])
def test_a_launch_is_on_the_device_of_its_first_tensor(on: str, launched_on: int, current: list[int]) -> None:
    seen = []

    @on_own_device
    def launch(eps: float, x: torch.Tensor, *, scale: float) -> float:
        """What it says."""
        seen.append(current[-1])
        return eps * scale

    with FakeTensorMode():
        x = torch.empty(3, device=on)
    assert launch(2.0, x, scale=3.0) == 6.0 and launch.__doc__ == "What it says."
    assert seen == [launched_on] and current == [0]


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.gpu
@requires_cuda
@two_devices
class TestOnASecondDevice:
    """The current device is the first all the time."""

    device = "cuda:1"

    @pytest.fixture(autouse=True)
    def seeded(self) -> None:
        torch.manual_seed(0)

    def ends_on_the_first(self) -> None:
        assert torch.cuda.current_device() == 0

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device)

    def test_operators_of_decoding(self) -> None:
        x, weight = self.randn(3, 64), self.randn(64)
        assert relative_error(rms_norm(x, weight, 1e-6)[0], rms_norm_reference(x, weight, 1e-6)[0]) < 1e-5
        assert relative_error(silu_mul(x), silu_mul_reference(x)) < 1e-5
        x, dt, a, b, c, d = (tensor.detach().to(self.device) for tensor in inputs((4, 2, 1))[:6])
        state = self.randn(x.shape[0], dt.shape[2], x.shape[3], b.shape[3])
        one = (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0])
        expected, _ = ssd_step_reference(*one, state.clone(), d)
        assert relative_error(ssd_step(*one, state, d), expected) < 1e-5
        self.ends_on_the_first()

    def test_the_scan_forth_and_back(self) -> None:
        leaves = [tensor.detach().to(self.device).requires_grad_() for tensor in inputs((4, 2, 1))[:6]]
        y, expected = ssd_scan(*leaves)[0], chunked_scan(*leaves)[0]
        assert relative_error(y, expected) < 1e-5
        weight = self.randn(*y.shape)
        for ours, theirs in zip(*(torch.autograd.grad(out, leaves, weight) for out in (y, expected)), strict=True):
            assert relative_error(ours, theirs) < 1e-4
        self.ends_on_the_first()

    def test_the_loss_forth_and_back(self) -> None:
        student_h, student_w = (self.randn(*shape).requires_grad_() for shape in ((5, 64), (300, 64)))
        teacher_h, teacher_w = self.randn(5, 32), self.randn(300, 32)
        ours = linear_kl(student_h, student_w, teacher_h, teacher_w).loss
        theirs = linear_kl_reference(student_h, student_w, teacher_h, teacher_w)[0]
        assert relative_error(ours, theirs) < 1e-4
        pairs = (torch.autograd.grad(loss, (student_h, student_w)) for loss in (ours, theirs))
        for our_gradient, their_gradient in zip(*pairs, strict=True):
            assert relative_error(our_gradient, their_gradient) < 1e-3
        self.ends_on_the_first()
