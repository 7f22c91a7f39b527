"""The recurrence in plain torch, a token at a time: the contract.

Legend: B rows, T tokens, H heads, P head width, N state width. `x`, `b` and `c` may have fewer heads than H, each a
number that divides H: head h reads their head h // (H / heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference import compute_dtype


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_tᵀ`, `y_t = h_t c_t + d x_t`, h_t [P, N] a head, from `initial_state`.

    The state is zero before a token whose id in `documents` differs from the one before it in its row. Computed in fp32
    (fp64 for fp64). Returns y [B, T, H, P] in x's dtype and the state after the last token [B, H, P, N].
    """
    heads, wide = dt.shape[-1], compute_dtype(x)
    state = initial_state
    if state is None:
        state = x.new_zeros(x.shape[0], heads, x.shape[-1], b.shape[-1], dtype=wide)
    outputs = []
    for token in range(x.shape[1]):
        if documents is not None and token > 0:
            goes_on = documents[:, token] == documents[:, token - 1]
            state = state * goes_on[:, None, None, None]
        y, state = ssd_step_reference(x[:, token], dt[:, token], a, b[:, token], c[:, token], state, d)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_step_reference(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, d: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence: y [B, H, P] in x's dtype and the new state [B, H, P, N]; nothing in place."""
    heads, wide = dt.shape[-1], compute_dtype(x)
    x_h, b_h, c_h = (part.to(wide).repeat_interleave(heads // part.shape[1], dim=1) for part in (x, b, c))
    dt, a = dt.to(wide), a.to(wide)
    state = state * (dt * a).exp()[..., None, None] + (dt[..., None] * x_h)[..., None] * b_h[..., None, :]
    y = (state * c_h[..., None, :]).sum(-1)
    if d is not None:
        y = y + d.to(wide)[:, None] * x_h
    return y.to(x.dtype), state
