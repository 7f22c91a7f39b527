"""Which code an operator runs: Triton on CUDA tensors, torch elsewhere, and Triton's interpreter when a test asks."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether these tensors go to the Triton kernels; None (an option not given) is passed over.

    True when all are on CUDA devices and triton is installed, or when triton's interpreter is on (`TRITON_INTERPRET=1`
    in the environment before triton is imported), which runs kernels on CPU tensors for the tests.
    """
    if not triton_available():
        return False
    return interpreted() or all(tensor.is_cuda for tensor in tensors if tensor is not None)


def interpreted() -> bool:
    """Whether triton's CPU interpreter is on. Its bf16 `tl.dot` is wrong: operators are tested in fp32 there."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_available() -> bool:
    """Whether triton is installed. It is looked up, not imported: a CPU process need not pay for the import."""
    return importlib.util.find_spec("triton") is not None


@cache
def nvidia_generation(device: torch.device) -> int:
    """The first number of an NVIDIA card's compute capability, 9 for Hopper; 0 for other devices, AMD's cards too.

    From Hopper on there are the copy engine and launches that overlap.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0]


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a tensor's CUDA device, as Triton counts them."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def on_own_device(launch: Callable[P, R]) -> Callable[P, R]:
    """`launch` with the device of its first tensor as the current one.

    Triton launches on the current device, whatever device the tensors are on. Backward passes need no such thing:
    autograd runs them on the device of what they belong to.
    """

    @functools.wraps(launch)
    def run(*arguments: P.args, **options: P.kwargs) -> R:
        values = (*arguments, *options.values())
        device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*arguments, **options)
        with torch.cuda.device(device):
            return launch(*arguments, **options)

    return run
