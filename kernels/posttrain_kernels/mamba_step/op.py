"""`conv_step` and `gated_norm`: checks and dispatch.

Legend: B rows, C channels, K taps; a head has `width` channels, C is the heads of x, B and C in this order.
"""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import conv_step_reference, gated_norm_reference


def conv_step(
    drive: Tensor,
    columns: Tensor,
    taps: Tensor,
    bias: Tensor,
    heads: tuple[int, int, int],
    *,
    repeats: int = 1,
    silu: bool = True,
    b_norm: Tensor | None = None,
    c_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """One token of Mamba-2's causal depthwise convolution, the activation and the norms of B and C; inference only.

    `columns` is moved on by one column in place, so that it holds the last K. The convolution is the one before the
    recurrence in Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060, section 7); norms of B and C stand for the queries' and
    keys' norms of the attention that a layer was made from.

    Args:
        drive: [B, C] of the input projection, a slice of it or not; with `repeats`, x and B have as many fewer heads
            there and are repeated before the convolution.
        columns: [at least B, C, K], dense: what the convolution has seen; the first B rows are read and written.
        taps: [C, K]; bias: [C].
        heads: heads of x, B and C after the repetition.
        b_norm, c_norm: [width], weights of the norms of B's and C's heads; eps: of both.

    Returns:
        [B, heads of all three, width] in drive's dtype.

    Raises:
        ValueError: shapes that do not fit, or columns that are not dense. RuntimeError: a gradient would be recorded.
    """
    refuse_gradients("conv_step", drive, columns, taps, bias, b_norm, c_norm)
    _check(drive, columns, taps, bias, heads, repeats, b_norm, c_norm)
    run = conv_step_reference
    if use_inference_kernel(drive, columns, taps, bias, b_norm, c_norm):
        from .kernels import conv_step_triton as run
    options = dict(repeats=repeats, silu=silu, b_norm=b_norm, c_norm=c_norm, eps=eps)
    return run(drive, columns, taps, bias, heads, **options)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor | None, eps: float, width: int) -> Tensor:
    """`weight · norm(y · silu(z))`, the norm over each head of `width` channels; inference only.

    Args:
        y: [B, D], what the recurrence gives; z: [B, D], the gate, a slice of the projection or not.
        weight: [D]; None: no norm, the gated product alone.

    Returns:
        [B, D] in z's dtype (the promoted dtype of z and the weight).

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a gradient would be recorded.
    """
    refuse_gradients("gated_norm", y, z, weight)
    if y.dim() != 2 or y.shape != z.shape or width < 1 or y.shape[1] % width:
        raise ValueError(f"y {tuple(y.shape)} and z {tuple(z.shape)} are not the same heads of {width} channels")
    if weight is not None and weight.shape != z.shape[1:]:
        raise ValueError(f"the weight {tuple(weight.shape)} does not fit z {tuple(z.shape)}")
    run = gated_norm_reference
    if use_inference_kernel(y, z, weight):
        from .kernels import gated_norm_triton as run
    return run(y, z, weight, eps, width)


def _check(
    drive: Tensor,
    columns: Tensor,
    taps: Tensor,
    bias: Tensor,
    heads: tuple[int, int, int],
    repeats: int,
    b_norm: Tensor | None,
    c_norm: Tensor | None,
) -> None:
    channels = columns.shape[1] if columns.dim() == 3 else 0
    if not channels or channels % sum(heads):
        raise ValueError(f"columns {tuple(columns.shape)} are not [B, C, K] of {sum(heads)} heads")
    if not columns.is_contiguous():
        raise ValueError("columns must be dense: what is written to a copy would be lost")
    width = channels // sum(heads)
    if repeats < 1 or heads[0] % repeats or heads[1] % repeats:
        raise ValueError(f"{heads[0]} heads of x and {heads[1]} of B are not {repeats} times as many as some")
    expected = ((heads[0] + heads[1]) // repeats + heads[2]) * width
    if drive.dim() != 2 or drive.shape[1] != expected or drive.shape[0] > columns.shape[0]:
        raise ValueError(f"drive {tuple(drive.shape)} does not fit columns {tuple(columns.shape)}: {expected} channels")
    if taps.shape != columns.shape[1:] or bias.shape != (channels,):
        raise ValueError(f"taps {tuple(taps.shape)} and bias {tuple(bias.shape)} do not fit {tuple(columns.shape)}")
    for name, weight in (("b_norm", b_norm), ("c_norm", c_norm)):
        if weight is not None and weight.shape != (width,):
            raise ValueError(f"{name} {tuple(weight.shape)} is not one number for each of {width} channels of a head")
