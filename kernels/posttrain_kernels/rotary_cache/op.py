"""`rotary_cache`, `latent_cache` and `rotate`: checks and dispatch. Legend: see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from ..inference import refuse_gradients, use_inference_kernel
from .reference import latent_cache_reference, rotary_cache_reference, rotate_reference


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate one token's queries and keys, and write its keys and values into the caches; inference only.

    Args:
        qkv: [B, (H + 2G) d], query heads first, then keys, then values.
        cos, sin: [P, d], both halves, in fp32 or in the model's dtype; positions: [B] int64, the row in them.
        slot: int64, one element on the device, where every row writes.
        k_cache, v_cache: [Bmax, G, S, d] with Bmax >= B, any strides with a dense last dimension.
        q_norm, k_norm: [d], weights of an RMSNorm on each head before the rotation (Qwen3), with `eps`.

    Returns:
        The rotated queries [B, H, d].

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a gradient would be recorded. A position or slot outside its
        range is not checked on a GPU, where reading it would stop the host.
    """
    refuse_gradients("rotary_cache", qkv, q_norm, k_norm)
    shared, width = k_cache.shape[1], k_cache.shape[3]
    if k_cache.shape != v_cache.shape or k_cache.shape[0] < qkv.shape[0]:
        raise ValueError(f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)} do not fit {qkv.shape[0]} rows")
    if qkv.shape[-1] % width or qkv.shape[-1] // width <= 2 * shared:
        raise ValueError(f"a projection {qkv.shape[-1]} wide holds no queries beside 2·{shared} heads of {width}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm are given together or not at all")
    _check_tables(cos, sin, positions, qkv.shape[0], width)
    arguments = (qkv, cos, sin, positions, slot, k_cache, v_cache, q_norm, k_norm, eps)
    if not use_inference_kernel(*arguments[:-1]):
        return rotary_cache_reference(*arguments)
    from .launch import rotary_cache_triton

    return rotary_cache_triton(*arguments)


def latent_cache(
    kv_a: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Write one token's latent and rotated key of latent attention into the caches; inference only.

    Args:
        kv_a: [B, r + d_r]; latent_cache: [Bmax, S, r] or [Bmax, 1, S, r]; rope_cache: the same with d_r.
        cos, sin: [P, d_r]; positions, slot: as in `rotary_cache`.
        norm_weight: [r], weight of an RMSNorm on the latent, with `eps`.

    Raises:
        ValueError, RuntimeError: as `rotary_cache`.
    """
    refuse_gradients("latent_cache", kv_a, norm_weight)
    latent_cache, rope_cache = _with_head(latent_cache), _with_head(rope_cache)
    rank, width = latent_cache.shape[-1], rope_cache.shape[-1]
    if latent_cache.shape[:3] != rope_cache.shape[:3] or latent_cache.shape[0] < kv_a.shape[0]:
        raise ValueError(f"caches {tuple(latent_cache.shape)}, {tuple(rope_cache.shape)} do not fit {len(kv_a)} rows")
    if kv_a.shape[-1] != rank + width:
        raise ValueError(f"a projection {kv_a.shape[-1]} wide is not a latent of {rank} and a rotary key of {width}")
    _check_tables(cos, sin, positions, kv_a.shape[0], width)
    arguments = (kv_a, cos, sin, positions, slot, latent_cache, rope_cache, norm_weight, eps)
    if not use_inference_kernel(*arguments[:-1]):
        return latent_cache_reference(*arguments)
    from .launch import latent_cache_triton

    return latent_cache_triton(*arguments)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """x [B, H, d] rotated by the tables [P, d] at `positions` [B]; dense, in x's dtype; inference only.

    `x` may be a part of a wider query (any strides with a dense last dimension).

    Raises:
        ValueError, RuntimeError: as `rotary_cache`.
    """
    refuse_gradients("rotate", x)
    _check_tables(cos, sin, positions, x.shape[0], x.shape[-1])
    if not use_inference_kernel(x, cos, sin, positions):
        return rotate_reference(x, cos, sin, positions)
    from .launch import rotate_triton

    return rotate_triton(x, cos, sin, positions)


def _with_head(cache: Tensor) -> Tensor:
    """[Bmax, S, d] as [Bmax, 1, S, d]."""
    return cache.unsqueeze(1) if cache.dim() == 3 else cache


def _check_tables(cos: Tensor, sin: Tensor, positions: Tensor, rows: int, width: int) -> None:
    if width % 2 or cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != width:
        raise ValueError(f"tables {tuple(cos.shape)}, {tuple(sin.shape)} do not turn heads of an even width {width}")
    if positions.shape != (rows,):
        raise ValueError(f"positions {tuple(positions.shape)} is not one position for each of {rows} rows")
