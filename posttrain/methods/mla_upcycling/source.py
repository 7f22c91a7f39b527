"""One source attention block as the plan sees it: affine maps and moments, float64.

Without QK-norm queries, keys and values are affine in the block's input x, and E[x xᵀ], E[x] give every moment.
With it (Qwen3) keys are not: calibration then observes y = [x ; k̂], k̂ the normalised keys, of which keys and values
are affine again, and the moment of the normalised queries of every group. Without calibration x is taken as white and
a norm as the constant that it is on average: weight / root mean square of the head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain.methods.mla_upcycling import latent

NORMED_FLOOR = 1e-6
"""Least energy of any direction of normalised keys, as a share of the mean: assumed where there is no calibration."""


def observed_width(attention: nn.Module, hidden_size: int) -> int:
    """Width of what calibration observes in that block: D, with QK-norm D + G·d_h."""
    return hidden_size + (attention.k_proj.weight.shape[0] if _normed(attention) else 0)


def observe(attention: nn.Module, x: Tensor) -> Tensor:
    """What calibration sums up of inputs x [tokens, D]: x itself, with QK-norm [x ; normalised keys]."""
    if not _normed(attention):
        return x
    keys = _heads(attention.k_proj, attention.k_norm, x)
    return torch.cat([x, keys.flatten(1).to(x.dtype)], dim=-1)


def observe_queries(attention: nn.Module, x: Tensor) -> Tensor | None:
    """Σ over tokens and heads of a group of q̂ q̂ᵀ, normalised queries [G, d_h, d_h]; None without QK-norm."""
    if not _normed(attention):
        return None
    queries = _heads(attention.q_proj, attention.q_norm, x).float()
    groups = attention.k_proj.weight.shape[0] // queries.shape[-1]
    return torch.einsum("tghd,tghe->gde", *[queries.unflatten(1, (groups, -1))] * 2)


def _normed(attention: nn.Module) -> bool:
    return getattr(attention, "k_norm", None) is not None


def _heads(projection: nn.Linear, norm: nn.Module, x: Tensor) -> Tensor:
    """Normalised heads [tokens, heads, d_h]; not through the module's own call, which would run its hooks."""
    projected = linear(x.to(projection.weight.dtype), projection.weight, projection.bias)
    return norm(projected.unflatten(-1, (-1, norm.weight.shape[0])))


@dataclass(frozen=True)
class SourceLayer:
    """One source attention block in float64, with the moments of what was observed (None, None: white).

    Attributes:
        query: weight [H·d_h, D] and bias of the queries, before any norm.
        keys_values: weight and bias of un-repeated [keys ; values] as an affine map of what was observed; keys after
            their norm, before rotation.
        output: [D, H·d_h].
        second, mean: E[y yᵀ], E[y] of what was observed.
        query_norm: weight [d_h] of the queries' norm, None without.
        query_moments: Σ over the heads of a group of E[q̂ q̂ᵀ] [G, d_h, d_h], where a norm was observed.
    """

    query: tuple[Tensor, Tensor]
    keys_values: tuple[Tensor, Tensor]
    output: Tensor
    second: Tensor | None
    mean: Tensor | None
    query_norm: Tensor | None = None
    query_moments: Tensor | None = None

    @classmethod
    def read(
        cls,
        attention: nn.Module,
        second: Tensor | None = None,
        mean: Tensor | None = None,
        query_moments: Tensor | None = None,
    ) -> SourceLayer:
        query, key, value = (_affine(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
        device = key[0].device
        second, mean, query_moments = (
            found if found is None else found.to(device) for found in (second, mean, query_moments)
        )
        query_norm = None
        if _normed(attention):
            key_norm, query_norm = attention.k_norm.weight.detach().double(), attention.q_norm.weight.detach().double()
            if second is None:
                key = _as_if_constant(key, key_norm)
            else:
                key, value = _of_observed(key[0], value)
        stacked = (torch.cat([key[0], value[0]]), torch.cat([key[1], value[1]]))
        output = attention.o_proj.weight.detach().double()
        return cls(query, stacked, output, second, mean, query_norm, query_moments)

    def input_moments(self) -> tuple[Tensor | None, Tensor | None]:
        """E[x xᵀ] [D, D] and E[x] of the block's input alone; None, None for white."""
        width = self.query[0].shape[1]
        if self.second is None or self.mean is None:
            return None, None
        return self.second[:width, :width], self.mean[:width]

    def key_value_moments(self) -> tuple[Tensor, Tensor]:
        """E[n nᵀ] [2·G·d_h, 2·G·d_h] and E[n] of un-repeated n = [keys ; values], keys as in `keys_values`."""
        moment, mean = latent.output_moment(*self.keys_values, self.second, self.mean)
        if self.query_norm is not None and self.second is None:
            # The norm takes keys out of the range of their map: no direction of theirs is surely empty.
            keys = moment.diagonal()[: len(moment) // 2]
            keys += NORMED_FLOOR * keys.mean()
        return moment, mean

    def query_moment(self, heads: int) -> Tensor:
        """E[q qᵀ] of every query head before its norm, [H, d_h, d_h]."""
        weight, bias = (part.unflatten(0, (heads, -1)) for part in self.query)
        inputs = self.input_moments()
        return torch.stack([latent.output_moment(weight[head], bias[head], *inputs)[0] for head in range(heads)])

    def group_query_moments(self, heads: int, kv_heads: int) -> Tensor:
        """Σ over the heads of a group of E[q qᵀ] [G, d_h, d_h], queries as they meet the keys: after their norm."""
        if self.query_moments is not None:
            return self.query_moments
        moments = self.query_moment(heads)
        if self.query_norm is not None:
            scale = norm_scale(moments, self.query_norm)
            moments = scale[:, :, None] * moments * scale[:, None, :]
        return moments.unflatten(0, (kv_heads, heads // kv_heads)).sum(1)


def norm_scale(moments: Tensor, weight: Tensor) -> Tensor:
    """weight / root mean square of each head [heads, d_h]: a norm as the constant that it is on average.

    Args:
        moments: second moments before the norm [heads, d_h, d_h].
    """
    square = moments.diagonal(dim1=-2, dim2=-1).mean(-1)
    return weight / square.clamp_min(torch.finfo(moments.dtype).tiny).sqrt()[:, None]


def _as_if_constant(key: tuple[Tensor, Tensor], norm: Tensor) -> tuple[Tensor, Tensor]:
    """The keys' map times their norm's constant under white inputs."""
    weight, bias = (part.unflatten(0, (-1, len(norm))) for part in key)
    moments = torch.stack([latent.output_moment(w, b, None, None)[0] for w, b in zip(weight, bias, strict=True)])
    scale = norm_scale(moments, norm)
    return (weight * scale[..., None]).flatten(0, 1), (bias * scale).flatten()


def _of_observed(
    key_weight: Tensor, value: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Keys and values as affine maps of [x ; k̂]: a selector, and the values' map beside zeros."""
    keys, width = key_weight.shape
    eye = torch.eye(keys, dtype=key_weight.dtype, device=key_weight.device)
    selected = torch.cat([eye.new_zeros(keys, width), eye], dim=1)
    weight = torch.cat([value[0], value[0].new_zeros(len(value[0]), keys)], dim=1)
    return (selected, eye.new_zeros(keys)), (weight, value[1])


def _affine(projection: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = projection.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if projection.bias is None else projection.bias.detach().double()
    return weight, bias
