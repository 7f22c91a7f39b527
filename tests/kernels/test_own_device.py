"""Triton launches on the current device: operators make that of their tensors the current one."""

from __future__ import annotations

import contextlib
import pkgutil
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import relative_error
from posttrain_kernels.decode_attention import decode_attention, decode_attention_reference
from posttrain_kernels.dispatch import on_own_device
from posttrain_kernels.linear_kl import linear_kl, linear_kl_reference
from posttrain_kernels.mamba_step import gated_norm, gated_norm_reference
from posttrain_kernels.mla_decode import mla_decode, mla_decode_reference
from posttrain_kernels.rms_norm import rms_norm, rms_norm_reference
from posttrain_kernels.rotary_cache import rotate, rotate_reference
from posttrain_kernels.ssd_scan import ssd_scan, ssd_step, ssd_step_reference
from posttrain_kernels.ssd_scan.torch_scan import chunked_scan
from posttrain_kernels.swiglu import silu_mul, silu_mul_reference
from ssd_scan_cases import inputs
from torch import Tensor
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


@pytest.mark.parametrize(
    "launcher",
    [
        "decode_attention.launch:decode_attention_triton",
        "linear_kl.scale:scale_in_place",
        "linear_kl.triton_rows:TritonRows.step",
        "mamba_step.kernels:conv_step_triton",
        "mamba_step.kernels:gated_norm_triton",
        "mla_decode.launch:mla_decode_triton",
        "rms_norm.kernels:rms_norm_triton",
        "rotary_cache.launch:latent_cache_triton",
        "rotary_cache.launch:rotary_cache_triton",
        "rotary_cache.launch:rotate_triton",
        "ssd_scan.launch:step_in_place",
        "ssd_scan.triton_scan:triton_scan",
        "swiglu.kernels:silu_mul_triton",
    ],
)
def test_every_operator_is_launched_so(launcher: str) -> None:
    run = pkgutil.resolve_name(f"posttrain_kernels.{launcher}")
    assert run.__wrapped__.__code__ is not run.__code__
    assert run.__code__ is on_own_device(run.__wrapped__).__code__


SECOND = "cuda:1"
"""The current device is the first all the time."""
on_two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture
def draw() -> Iterator[Callable[..., Tensor]]:
    torch.manual_seed(0)
    yield lambda *shape: torch.randn(*shape, device=SECOND)
    if SECOND != "cpu":
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@on_two_devices
@torch.no_grad()
def test_operators_of_decoding_on_a_second_device(draw: Callable[..., Tensor]) -> None:
    x, weight = draw(3, 64), draw(64)
    start, length = torch.zeros(3, dtype=torch.int32, device=SECOND), torch.tensor(7, dtype=torch.int32, device=SECOND)
    positions = torch.arange(3, device=SECOND)
    q, rope = draw(3, 4, 64), draw(3, 4, 16)
    attention = (q, draw(3, 2, 9, 64), draw(3, 2, 9, 64), start, length, 0.125)
    latent = (q, rope, draw(3, 9, 64), draw(3, 9, 16), start, length, 0.125)
    for ours, theirs in (
        (rms_norm(x, weight, 1e-6)[0], rms_norm_reference(x, weight, 1e-6)[0]),
        (silu_mul(x), silu_mul_reference(x)),
        (gated_norm(x, 2 * x, weight, 1e-6, 64), gated_norm_reference(x, 2 * x, weight, 1e-6, 64)),
        (rotate(rope, x[:, :16], x[:, 16:32], positions), rotate_reference(rope, x[:, :16], x[:, 16:32], positions)),
        (decode_attention(*attention), decode_attention_reference(*attention)),
        (mla_decode(*latent), mla_decode_reference(*latent)),
    ):
        assert relative_error(ours, theirs) < 1e-4


@pytest.mark.gpu
@on_two_devices
def test_the_scan_on_a_second_device_forth_and_back_and_a_step(draw: Callable[..., Tensor]) -> None:
    leaves = [tensor.to(SECOND).requires_grad_() for tensor in inputs((4, 2, 1))[:6]]
    y, expected = ssd_scan(*leaves)[0], chunked_scan(*leaves, None, None, 64)[0]
    assert relative_error(y, expected) < 1e-5
    weight = draw(*y.shape)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, weight) for out in (y, expected)), strict=True):
        assert relative_error(ours, theirs) < 1e-4
    x, dt, a, b, c, d = (leaf.detach() for leaf in leaves)
    state, one = draw(x.shape[0], dt.shape[2], x.shape[3], b.shape[3]), (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0])
    expected, _ = ssd_step_reference(*one, state.clone(), d)
    assert relative_error(ssd_step(*one, state, d), expected) < 1e-5


@pytest.mark.gpu
@on_two_devices
def test_the_loss_on_a_second_device_forth_and_back(draw: Callable[..., Tensor]) -> None:
    student = draw(5, 64).requires_grad_(), draw(300, 64).requires_grad_()
    teacher = draw(5, 32), draw(300, 32)
    ours, theirs = 2 * linear_kl(*student, *teacher).loss, 2 * linear_kl_reference(*student, *teacher)[0]
    assert relative_error(ours, theirs) < 1e-4
    for gradient, expected in zip(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)), strict=True):
        assert relative_error(gradient, expected) < 1e-3
