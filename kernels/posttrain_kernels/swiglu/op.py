"""`silu_mul`: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import silu_mul_reference


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up [..., I] of one packed projection [..., 2I], gate first; inference only.

    Raises:
        ValueError: a last dimension that has no two halves. RuntimeError: a gradient would be recorded.
    """
    refuse_gradients("silu_mul", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are two halves of the last dimension, which is {gate_up.shape[-1]}")
    if not use_inference_kernel(gate_up):
        return silu_mul_reference(gate_up)
    from .kernels import silu_mul_triton

    return silu_mul_triton(gate_up)
