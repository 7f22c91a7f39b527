"""`rms_norm`: checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import rms_norm_reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Add the residual stream and normalise, in one pass; inference only.

    Args:
        x: [..., D], the output of the last sublayer, or the stream itself where `residual` is None.
        weight: [D].
        residual: [..., D], the stream so far; its dtype is that of the new stream.

    Returns:
        y [..., D] in the promoted dtype of x and weight, and the new stream [..., D] (`x` itself without residual).

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a gradient would be recorded.
    """
    refuse_gradients("rms_norm", x, weight, residual)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight {tuple(weight.shape)} does not fit the last dimension of x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} and x {tuple(x.shape)} differ in shape")
    if not use_inference_kernel(x, weight, residual):
        return rms_norm_reference(x, weight, eps, residual)
    from .kernels import rms_norm_triton

    return rms_norm_triton(x, weight, eps, residual)
