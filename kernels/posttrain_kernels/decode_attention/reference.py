"""Attention over a static cache in plain torch: the contract, and what the CPU runs.

Legend: B rows, one query token each; H query heads share G key/value heads; S slots; d_k, d_v widths; d_r rotary width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..inference import compute_dtype


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    rope_cache: Tensor | None = None,
) -> Tensor:
    """softmax(scale · (q·k + q_rope·k_rope)) v over the slots start_b <= s < length; [B, H, d_v] in q's dtype.

    A row without slots gives zeros. Slots outside the range may hold anything, NaN included.
    """
    rows = q.shape[0]
    keys, values, rope = (None if cache is None else cache[:rows] for cache in (k_cache, v_cache, rope_cache))
    if length.device.type == "cpu":  # On another device, reading it would stop the host.
        keys, values, rope = (None if cache is None else cache[:, :, : int(length)] for cache in (keys, values, rope))
    return masked_attention(q, keys, values, start, length, scale, q_rope, rope)


def masked_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    rope: Tensor | None = None,
) -> Tensor:
    """The same over all slots of caches [B, G, S, ·], with a mask in place of the bounds."""
    wide, shared = compute_dtype(q), keys.shape[1]
    slots = torch.arange(keys.shape[2], device=q.device)
    seen = ((slots >= start[:, None]) & (slots < length.reshape(1)))[:, None, None]  # [B, 1, 1, S]
    scores = q.to(wide).unflatten(1, (shared, -1)) @ keys.to(wide).transpose(2, 3)  # [B, G, H/G, S]
    if q_rope is not None:
        scores = scores + q_rope.to(wide).unflatten(1, (shared, -1)) @ rope.to(wide).transpose(2, 3)
    # The lowest finite number instead of -inf: a row without slots must not become NaN.
    scores = (scores * scale).masked_fill(~seen, torch.finfo(wide).min)
    # Zeroed values drop what no row may see, NaN included, and are all that a row without slots mixes.
    mixed = scores.softmax(dim=-1) @ values.to(wide).masked_fill(~seen.transpose(2, 3), 0.0)
    return mixed.flatten(1, 2).to(q.dtype)
