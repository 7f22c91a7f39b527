"""The recurrence of Mamba-2 in torch, a chunk of tokens at a time (Dao and Gu, 2024, arXiv 2405.21060).

    h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_tᵀ        y_t = h_t c_t + d x_t

Legend: B rows, T tokens, L tokens of a chunk, H heads, P head width, N state width. `x`, `b` and `c` may have fewer
heads than H: head h reads their head h // (H / heads). Within a chunk the outputs are one masked product, as attention;
from chunk to chunk the state is carried. Everything is computed in fp32 (fp64 for fp64), whatever autocast says.

This file stands alone and lies in two places, since saved models carry their code: `posttrain_kernels/ssd_scan/` and
`posttrain/models/upcycled/`. A test holds the two equal.
"""

from __future__ import annotations

import torch

CHUNK = 64
"""Tokens of a chunk: the masked product costs L a token, the state N; for widths of 64 to 128 they balance here."""


def chunked_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, T, H, P] in the type of `x`, and the state after the last token [B, H, P, N]; differentiable.

    Args:
        x: [B, T, ·, P]; dt: [B, T, H], not negative; a: [H], negative; b, c: [B, T, ·, N]; d: [H].
        initial_state: [B, H, P, N], zero if None.
        documents: integers [B, T]; the state starts anew at a token whose number differs from the one before.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, length, heads = dt.shape
    state = initial_state
    if state is None:
        state = x.new_zeros(rows, heads, x.shape[-1], b.shape[-1], dtype=wide)
    runs = None if documents is None else _runs(documents)
    last = None if runs is None else runs[:, 0]
    outputs = []
    # bf16 autocast would round the operands of every product here, the state among them.
    with torch.autocast(device_type=x.device.type, enabled=False):
        state, dt, a = state.to(wide), dt.to(wide), a.to(wide)
        for start in range(0, length, chunk):
            part = slice(start, start + chunk)
            parts = [_all_heads(tensor[:, part].to(wide), heads) for tensor in (x, b, c)]
            run = None if runs is None else runs[:, part]
            y, state = _chunk(*parts, dt[:, part], a, state, run, last)
            outputs.append(y if d is None else y + d.to(wide)[:, None] * parts[0])
            last = None if run is None else run[:, -1]
    return torch.cat(outputs, dim=1).to(x.dtype), state


def single_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    d: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token, for decoding: output [B, H, P] in the type of `x`; `state` [B, H, P, N] is updated in place.

    x [B, ·, P], dt [B, H], a [H], b and c [B, ·, N], d [H].
    """
    wide, heads = state.dtype, dt.shape[-1]
    with torch.autocast(device_type=x.device.type, enabled=False):
        x_h, b_h, c_h = (_all_heads(part[:, None].to(wide), heads)[:, 0] for part in (x, b, c))
        dt, a = dt.to(wide), a.to(wide)
        state.mul_((dt * a).exp()[..., None, None]).add_((dt[..., None] * x_h)[..., None] * b_h[..., None, :])
        y = torch.matmul(state, c_h[..., None]).squeeze(-1)
        if d is not None:
            y = y + d.to(wide)[:, None] * x_h
    return y.to(x.dtype)


def _chunk(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor,
    run: torch.Tensor | None,
    last: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, L, H, P] of a chunk without the skip, and the state after it; x, b, c with all H heads.

    `run` [B, L] numbers the documents of each row, `last` [B] is the number of the token before the chunk.
    """
    # Sums of strong decays are long numbers with short differences: in fp64 a difference is exact enough for its exp.
    total = (dt * a).transpose(1, 2).double().cumsum(-1)  # [B, H, L]
    ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    if run is not None:
        ahead = (ahead | (run[:, :, None] != run[:, None, :]))[:, None]  # [B, 1, L, L]
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(ahead, -torch.inf).exp().to(x.dtype)
    driven = x * dt[..., None]
    mixed = torch.einsum("blhn,bshn->bhls", c, b) * decay
    y = torch.einsum("bhls,bshp->blhp", mixed, driven)
    from_before, to_end, whole = total, total[..., -1:] - total, total[..., -1]
    if run is not None:
        from_before = from_before.masked_fill((run != last[:, None])[:, None], -torch.inf)
        to_end = to_end.masked_fill((run != run[:, -1:])[:, None], -torch.inf)
        whole = whole.masked_fill((run[:, -1] != last)[:, None], -torch.inf)
    from_before, to_end, whole = (part.exp().to(x.dtype) for part in (from_before, to_end, whole))
    y = y + torch.einsum("blhn,bhpn->blhp", c, state) * from_before.transpose(1, 2)[..., None]
    driven = driven * to_end.transpose(1, 2)[..., None]
    return y, state * whole[..., None, None] + torch.einsum("blhp,blhn->bhpn", driven, b)


def _all_heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, fewer, ·] to [B, L, H, ·]."""
    return tensor if tensor.shape[2] == heads else tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


def _runs(documents: torch.Tensor) -> torch.Tensor:
    """Numbers 0, 1, … of the stretches of equal ids in each row, [B, T]."""
    starts = torch.zeros_like(documents, dtype=torch.long)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts.cumsum(-1)
