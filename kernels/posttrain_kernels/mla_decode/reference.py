"""Absorbed latent attention over a static cache in plain torch: the contract, and what the CPU runs.

Legend: B rows, one query token each; H query heads; S slots; r latent width; d_r rotary width.
"""

from __future__ import annotations

from torch import Tensor

from ..decode_attention.reference import decode_attention_reference


def mla_decode_reference(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
) -> Tensor:
    """softmax(scale · (q_latent·c + q_rope·k_rope)) c over the slots start_b <= s < length; [B, H, r] in q's dtype.

    It is attention of all heads over one key/value head whose keys and values are the latents c. A row without slots
    gives zeros. Slots outside the range may hold anything, NaN included.
    """
    latents, ropes = latent_cache.unsqueeze(1), rope_cache.unsqueeze(1)
    return decode_attention_reference(q_latent, latents, latents, start, length, scale, q_rope, ropes)
