"""Attention written a second time, from the formulas: the oracle of the conversion's tests; shares no code with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-5
"""rms_norm_eps of `make_source`."""


def turn(x: Tensor, frequencies: Tensor, positions: Tensor) -> Tensor:
    """RoPE on x [..., T, 2n] in half-split layout, as multiplication by e^{i θ t}."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones(()).to(x), positions[:, None] * frequencies)
    return torch.cat([turned.real, turned.imag], dim=-1)


def causal(scores: Tensor, values: Tensor) -> Tensor:
    """Softmax over scores [B, H, T, T] below the diagonal, times values [B, H, T, d_v]; heads joined: [B, T, H·d_v]."""
    steps = scores.shape[-1]
    hidden = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(1, 2).flatten(2)


def affine(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    y = x @ tensors[f"{name}.weight"].to(x).T
    return y + tensors[f"{name}.bias"].to(x) if f"{name}.bias" in tensors else y


def normed(x: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    """RMSNorm over the last dimension, where the block has one of that name."""
    if f"{name}.weight" not in tensors:
        return x
    return tensors[f"{name}.weight"].to(x) * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def source_heads(x: Tensor, tensors: dict[str, Tensor], heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-RoPE queries, keys and values [B, H, T, d_h], after their norm (Qwen3), KV heads repeated."""
    q, k, v = (
        affine(x, tensors, f"{name}_proj").unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = normed(q, tensors, "q_norm"), normed(k, tensors, "k_norm")
    return q, *(part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))


def source_attention(
    x: Tensor, tensors: dict[str, Tensor], heads: int, kv_heads: int, frequencies: Tensor, factor: float = 1.0
) -> Tensor:
    """The source's attention block on x [B, T, D]; `factor` is on cos and sin."""
    q, k, v = source_heads(x, tensors, heads, kv_heads)
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    scores = turn(q, frequencies, positions) @ turn(k, frequencies, positions).mT
    return affine(causal(scores * factor**2 * q.shape[-1] ** -0.5, v), tensors, "o_proj")


def latent_attention(x: Tensor, tensors: dict[str, Tensor], shape, frequencies: Tensor, factor: float = 1.0) -> Tensor:
    """The converted block on x [B, T, D]; `frequencies` are the d_r/2 of the rotary key, `factor` is on cos and sin."""
    d_n, d_r, d_v, heads = shape.qk_nope_head_dim, shape.qk_rope_head_dim, shape.v_head_dim, shape.heads
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    low = "q_a_proj.weight" in tensors
    q = affine(affine(x, tensors, "q_a_proj"), tensors, "q_b_proj") if low else affine(x, tensors, "q_proj")
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    seen = x
    if "q_map" in tensors:
        maps = tensors["q_map"].to(x).repeat_interleave(heads // shape.kv_heads, 0)
        q = normed(q, tensors, "q_norm") @ maps.mT
        keys = affine(x, tensors, "k_proj").unflatten(-1, (shape.kv_heads, -1))
        seen = torch.cat([x, normed(keys, tensors, "k_norm").flatten(2)], dim=-1)
    down = affine(seen, tensors, "kv_a_proj_with_mqa")
    latent, rope_key = down[..., :-d_r], down[..., -d_r:]
    up = affine(latent, tensors, "kv_b_proj").unflatten(-1, (heads, d_n + d_v)).transpose(1, 2)
    scores = q[..., :d_n] @ up[..., :d_n].mT
    turned = turn(q[..., d_n:], frequencies, positions) @ turn(rope_key, frequencies, positions).mT[:, None]
    scores = scores + factor**2 * turned
    return affine(causal(scores * shape.head_dim**-0.5, up[..., d_n:]), tensors, "o_proj")


def partial_rope_attention(
    x: Tensor, tensors: dict[str, Tensor], heads: int, kv_heads: int, frequencies: Tensor, key: Tensor, kept: list[int]
) -> Tensor:
    """The source's block with rotation left on one component of the pairs `kept` only: no latent, no merged heads.

    Args:
        key: [len(kept), G], the unit direction across KV heads that keeps its rotation, for each kept pair.
    """
    q, k, v = source_heads(x, tensors, heads, kv_heads)
    positions = torch.arange(x.shape[1], dtype=x.dtype)
    half, group = q.shape[-1] // 2, heads // kv_heads
    scores = q @ k.mT
    for direction, pair in zip(key.to(x), kept, strict=True):
        rows = [pair, pair + half]
        shared = sum(direction[g] * k[:, g * group][..., rows] for g in range(kv_heads))  # [B, T, 2]
        shared = shared[:, None]
        mine = q[..., rows] * direction.repeat_interleave(group)[:, None, None]
        frequency = frequencies[pair : pair + 1]
        scores = scores - mine @ shared.mT + turn(mine, frequency, positions) @ turn(shared, frequency, positions).mT
    return affine(causal(scores * q.shape[-1] ** -0.5, v), tensors, "o_proj")


def shared_rotary_attention(
    x: Tensor,
    tensors: dict[str, Tensor],
    heads: int,
    kv_heads: int,
    turning: Tensor,
    rotary_key: Tensor,
    rotary_query: Tensor,
    factor: float = 1.0,
) -> Tensor:
    """The source's block where only the shared key's part of every score turns, with frequencies `turning` [d_r/2].

    `factor` is what the source puts on cos and sin, of all its pairs.

    Args:
        rotary_key: [d_r, G·d_h]; rotary_query: [G, d_r, d_h].
    """
    q, k, v = source_heads(x, tensors, heads, kv_heads)
    positions, group = torch.arange(x.shape[1], dtype=x.dtype), heads // kv_heads
    shared = k[:, ::group].transpose(1, 2).flatten(2) @ rotary_key.to(x).T  # [B, T, d_r]
    scores = []
    for head in range(heads):
        mine = q[:, head] @ rotary_query[head // group].to(x).T
        turned = turn(mine, turning, positions) @ turn(shared, turning, positions).mT
        scores.append(q[:, head] @ k[:, head].mT - mine @ shared.mT + turned)
    scaling = factor**2 * q.shape[-1] ** -0.5
    return affine(causal(torch.stack(scores, dim=1) * scaling, v), tensors, "o_proj")


def tensors_of(attention: nn.Module) -> dict[str, Tensor]:
    """A block's parameters in float64."""
    return {name: tensor.detach().double() for name, tensor in attention.named_parameters()}


def frequencies_of(model: nn.Module) -> Tensor:
    """The source's rotary frequencies, float64 [d_h/2]."""
    return model.model.rotary_emb.inv_freq.double()
