"""`decode_attention`: checks and dispatch. Legend: see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import decode_attention_reference


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    q_rope: Tensor | None = None,
    rope_cache: Tensor | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """Attention of one token a row over the cache slots start_b <= s < length; inference only.

    Latent attention passes its latent cache as keys and as values (it is then read once), the query moved into latent
    space as `q`, and the rotary part of the scores as `q_rope` and `rope_cache`.

    Args:
        q: [B, H, d_k]; q_rope: [B, H, d_r].
        k_cache: [Bmax, G, S, d_k]; v_cache: [Bmax, G, S, d_v]; rope_cache: [Bmax, G, S, d_r]; G may be left out where
            it is 1. Bmax >= B, any strides with a dense last dimension.
        start: [B] int64, first valid slot of a row; length: int64, one element on the device, valid slots end there.
        scale: factor of the scores.
        splits: programs that share one row's slots; chosen from the shapes where None.

    Returns:
        [B, H, d_v] in q's dtype; zeros for a row with start_b >= length.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a gradient would be recorded. `length` above S is not checked
        on a GPU, where reading it would stop the host.
    """
    refuse_gradients("decode_attention", q, k_cache, v_cache, q_rope, rope_cache)
    same = k_cache is v_cache
    k_cache, rope_cache = _with_head(k_cache), _with_head(rope_cache)
    v_cache = k_cache if same else _with_head(v_cache)
    _check(q, k_cache, v_cache, start, q_rope, rope_cache)
    arguments = (q, k_cache, v_cache, start, length, scale, q_rope, rope_cache)
    if not use_inference_kernel(q, k_cache, v_cache, start, length, q_rope, rope_cache):
        return decode_attention_reference(*arguments)
    from .launch import decode_attention_triton

    return decode_attention_triton(*arguments, splits=splits)


def _with_head(cache: Tensor | None) -> Tensor | None:
    """[Bmax, S, d] as [Bmax, 1, S, d]."""
    return cache.unsqueeze(1) if cache is not None and cache.dim() == 3 else cache


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, q_rope: Tensor | None, rope_cache: Tensor | None
) -> None:
    rows, heads, width = q.shape
    if k_cache.shape[:3] != v_cache.shape[:3] or k_cache.shape[3] != width or k_cache.shape[0] < rows:
        raise ValueError(
            f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} do not fit the query {tuple(q.shape)}"
        )
    if heads % k_cache.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {k_cache.shape[1]} key/value heads evenly")
    if start.shape != (rows,):
        raise ValueError(f"start {tuple(start.shape)} is not one slot for each of {rows} rows")
    if (q_rope is None) != (rope_cache is None):
        raise ValueError("q_rope and rope_cache are given together or not at all")
    if q_rope is None:
        return
    if rope_cache.shape[:3] != k_cache.shape[:3] or q_rope.shape != (rows, heads, rope_cache.shape[3]):
        raise ValueError(f"q_rope {tuple(q_rope.shape)} and rope_cache {tuple(rope_cache.shape)} do not fit")
