"""`mla_decode`: checks and dispatch. Legend: see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import mla_decode_reference


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    *,
    splits: int | None = None,
) -> Tensor:
    """Latent attention (DeepSeek-V2, arXiv 2405.04434) of one token a row, in latent space; inference only.

    softmax_s(scale · (q_latent·c_s + q_rope·k_rope_s)) c_s over the slots start_b <= s < length. The caller moves the
    query into latent space, q_latent = q_nope W_K, and applies W_V to the result.

    Args:
        q_latent: [B, H, r]; q_rope: [B, H, d_r].
        latent_cache: [Bmax, S, r]; rope_cache: [Bmax, S, d_r]; Bmax >= B, any strides with a dense last dimension.
        start: [B] int64, first valid slot of a row; length: int64, one element on the device, valid slots end there.
        scale: factor of the scores.
        splits: programs that share one row's slots; chosen from the shapes where None.

    Returns:
        [B, H, r] in q_latent's dtype; zeros for a row with start_b >= length.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a gradient would be recorded. `length` above S is not checked
        on a GPU, where reading it would stop the host.
    """
    arguments = (q_latent, q_rope, latent_cache, rope_cache, start, length)
    refuse_gradients("mla_decode", *arguments[:4])
    _check(q_latent, q_rope, latent_cache, rope_cache, start)
    if not use_inference_kernel(*arguments):
        return mla_decode_reference(*arguments, scale)
    from .launch import mla_decode_triton

    return mla_decode_triton(*arguments, scale, splits=splits)


def _check(q_latent: Tensor, q_rope: Tensor, latent_cache: Tensor, rope_cache: Tensor, start: Tensor) -> None:
    rows, heads, rank = q_latent.shape
    if latent_cache.dim() != 3 or latent_cache.shape[2] != rank or latent_cache.shape[0] < rows:
        raise ValueError(f"latent_cache {tuple(latent_cache.shape)} does not fit q_latent {tuple(q_latent.shape)}")
    if rope_cache.dim() != 3 or rope_cache.shape[:2] != latent_cache.shape[:2]:
        raise ValueError(f"rope_cache {tuple(rope_cache.shape)} does not fit latent_cache {tuple(latent_cache.shape)}")
    if q_rope.shape != (rows, heads, rope_cache.shape[2]):
        raise ValueError(f"q_rope {tuple(q_rope.shape)} does not fit rope_cache {tuple(rope_cache.shape)}")
    if start.shape != (rows,):
        raise ValueError(f"start {tuple(start.shape)} is not one slot for each of {rows} rows")
