"""Grids, strides and outputs of the Triton kernels of rotary embedding and cache writes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import on_own_device
from ..inference import dense_width, unit_stride
from ..sizes import cdiv, next_power_of_2
from .kernels import latent_cache_kernel, rotary_cache_kernel, rotate_kernel

HEADS = 16
"""Heads of a program at most: a projection of SmolLM2-135M (9 + 2·3) is one program."""


@on_own_device
def rotary_cache_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """The Triton code behind `rotary_cache`; same contract, checks done."""
    qkv, cos, sin = unit_stride(qkv), unit_stride(cos), unit_stride(sin)
    rows, shared, width = qkv.shape[0], k_cache.shape[1], k_cache.shape[3]
    heads = qkv.shape[1] // width - 2 * shared
    out = torch.empty(rows, heads, width, device=qkv.device, dtype=qkv.dtype)
    tile = min(HEADS, next_power_of_2(heads + 2 * shared))
    half = next_power_of_2(width // 2)
    if rows:
        rotary_cache_kernel[(rows, cdiv(heads + 2 * shared, tile))](
            qkv,
            cos,
            sin,
            positions.contiguous(),
            slot,
            _dense(q_norm),
            _dense(k_norm),
            out,
            k_cache,
            v_cache,
            qkv.stride(0),
            cos.stride(0),
            sin.stride(0),
            *dense_width(k_cache).stride()[:3],
            *dense_width(v_cache).stride()[:3],
            heads,
            shared,
            eps,
            WIDTH=width,
            NORM=q_norm is not None,
            HEADS=tile,
            HALF=half,
            num_warps=_warps(tile * half),
        )
    return out


@on_own_device
def latent_cache_triton(
    kv_a: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    latent_cache: Tensor,
    rope_cache: Tensor,
    norm_weight: Tensor | None,
    eps: float,
) -> None:
    """The Triton code behind `latent_cache`; same contract, checks done, caches [Bmax, 1, S, ·]."""
    kv_a, cos, sin = unit_stride(kv_a), unit_stride(cos), unit_stride(sin)
    rank, width = latent_cache.shape[-1], rope_cache.shape[-1]
    block = next_power_of_2(rank)
    if kv_a.shape[0]:
        latent_cache_kernel[(kv_a.shape[0],)](
            kv_a,
            cos,
            sin,
            positions.contiguous(),
            slot,
            _dense(norm_weight),
            latent_cache,
            rope_cache,
            kv_a.stride(0),
            cos.stride(0),
            sin.stride(0),
            *dense_width(latent_cache).stride()[0:3:2],
            *dense_width(rope_cache).stride()[0:3:2],
            rank,
            eps,
            WIDTH=width,
            NORM=norm_weight is not None,
            BLOCK=block,
            HALF=next_power_of_2(width // 2),
            num_warps=_warps(block),
        )


@on_own_device
def rotate_triton(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The Triton code behind `rotate`; same contract, checks done."""
    x, cos, sin = unit_stride(x), unit_stride(cos), unit_stride(sin)
    rows, heads, width = x.shape
    out = torch.empty(rows, heads, width, device=x.device, dtype=x.dtype)
    tile, half = min(HEADS, next_power_of_2(heads)), next_power_of_2(width // 2)
    if out.numel():
        rotate_kernel[(rows, cdiv(heads, tile))](
            x,
            cos,
            sin,
            positions.contiguous(),
            out,
            *x.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            heads,
            WIDTH=width,
            HEADS=tile,
            HALF=half,
            num_warps=_warps(tile * half),
        )
    return out


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _warps(elements: int) -> int:
    return min(4, max(1, elements // 128))
