"""`ssd_scan` and `ssd_step`: checks and dispatch. Legend: see `reference.py`.

Triton where `triton_scan.py` says that its kernels take the tensors, `torch_scan.py` elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference import compute_dtype, refuse_gradients
from .torch_scan import CHUNK, chunked_scan, single_step
from .triton_scan import supports_scan, supports_step, triton_scan


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """State-space recurrence of Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060) with a scalar decay a head and token.

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_tᵀ, y_t = h_t c_t + d x_t. Differentiable in every floating tensor. States
    and sums are fp32 whatever the types of x, b and c, also under autocast (fp64 for fp64). Products on CUDA have bf16
    operands where x, b and c are bf16, and under bf16 autocast.

    Args:
        x: [B, T, H_x, P], what is written; b: [B, T, H_b, N], where to; c: [B, T, H_c, N], what reads. H_x, H_b and H_c
            divide H: head h reads head h // (H / H_x) and so on. Stock Mamba-2: H_x = H, H_b = H_c = n_groups.
        dt: [B, T, H] step sizes, not negative, softplus and bias done; 0 leaves the state as it is (padding).
        a: [H], negative; d: [H], skip connection.
        initial_state: [B, H, P, N], zero where None.
        documents: [B, T] integers, one number a document: the state is zero before a token whose number differs from
            the token's before it. `initial_state` belongs to the document of the first token.
        chunk: tokens that are mixed by one product; changes speed and memory, not the result.

    Returns:
        y [B, T, H, P] in x's dtype, and the state after the last token [B, H, P, N], fp32 (fp64 for fp64).

    Raises:
        ValueError: shapes that do not fit, no tokens, or a chunk below 1. Signs are not checked: that would wait for
            the device.
    """
    _check(x, dt, a, b, c, d, initial_state, tokens=2)
    if x.shape[1] == 0 or chunk < 1:
        raise ValueError(f"nothing to scan: {x.shape[1]} tokens in chunks of {chunk}")
    if documents is not None and (documents.shape != x.shape[:2] or documents.is_floating_point()):
        raise ValueError(f"documents {tuple(documents.shape)} must be integers of shape {tuple(x.shape[:2])}")
    if documents is not None and documents.device != x.device:
        raise ValueError(f"documents are on {documents.device}, x is on {x.device}")
    run = triton_scan if supports_scan(x, dt, a, b, c, d, initial_state) else chunked_scan
    return run(x, dt, a, b, c, d, initial_state, documents, chunk)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    d: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One token of `ssd_scan` for decoding; `state` is updated in place. Inference only.

    Args:
        x: [B, H_x, P]; dt: [B, H]; b: [B, H_b, N]; c: [B, H_c, N]; a, d: [H], all as in `ssd_scan`.
        state: [B, H, P, N], fp32 or fp64: decays near one, rounded to bf16, are wrong by half after a hundred tokens.
        dt_bias: [H], added to dt, and dt_softplus: the softplus after it; in fp32 (fp64 for fp64), as done here.

    Returns:
        [B, H, P] in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or a state below fp32. RuntimeError: a gradient would be recorded.
    """
    refuse_gradients("ssd_step", x, dt, a, b, c, state, d, dt_bias)
    _check(x, dt, a, b, c, d, state, tokens=1)
    if dt_bias is not None and dt_bias.shape != dt.shape[1:]:
        raise ValueError(f"dt_bias {tuple(dt_bias.shape)} is not one number for each of {dt.shape[1]} heads")
    if state.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the state must be fp32 or fp64, not {state.dtype}")
    if not supports_step(x, dt, a, b, c, state, d, dt_bias):
        return single_step(x, _step_sizes(dt, dt_bias, dt_softplus), a, b, c, state, d)
    from .launch import step_in_place

    return step_in_place(x, dt, a, b, c, state, d, dt_bias, dt_softplus)


def _step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """dt plus its bias, and the softplus of that, in fp32 or wider; dt itself where neither is asked for."""
    if bias is None and not softplus:
        return dt
    wide = dt.to(compute_dtype(dt))
    wide = wide if bias is None else wide + bias
    return torch.nn.functional.softplus(wide) if softplus else wide


def _check(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, state: Tensor | None, tokens: int
) -> None:
    """Shapes; `tokens` is the number of leading dimensions before the heads."""
    lead, heads = x.shape[:tokens], dt.shape[-1]
    if x.dim() != tokens + 2 or dt.shape != (*lead, heads):
        raise ValueError(f"dt {tuple(dt.shape)} does not fit x {tuple(x.shape)}")
    if b.shape[:-2] != lead or c.shape[:-2] != lead or b.shape[-1] != c.shape[-1]:
        raise ValueError(f"b {tuple(b.shape)} and c {tuple(c.shape)} do not fit x {tuple(x.shape)}")
    for name, tensor in (("x", x), ("b", b), ("c", c)):
        if not tensor.shape[-2] or heads % tensor.shape[-2]:
            raise ValueError(f"{tensor.shape[-2]} heads of {name} do not divide the {heads} heads of dt")
    for name, vector in (("a", a), ("d", d)):
        if vector is not None and vector.shape != (heads,):
            raise ValueError(f"{name} {tuple(vector.shape)} is not one number for each of {heads} heads")
    expected = (x.shape[0], heads, x.shape[-1], b.shape[-1])
    if state is not None and state.shape != expected:
        raise ValueError(f"the state {tuple(state.shape)} is not {expected}")
