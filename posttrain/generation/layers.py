"""Attention layers of the decoder: cache, prompt and step of each kind.

Legend: B rows, T tokens of the prompt, D hidden_size, H query heads, G key/value heads, d head width, S cache slots;
r, d_n, d_r, d_v: latent, position-free key, rotary key and value width of latent attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from posttrain_kernels.decode_attention import decode_attention
from posttrain_kernels.mla_decode import mla_decode
from posttrain_kernels.rms_norm import rms_norm
from posttrain_kernels.rotary_cache import latent_cache, rotary_cache, rotate
from torch.nn import functional as F

from posttrain.generation.caches import KeyValueCache, LatentCache, LayerCache
from posttrain.models.architecture import per_layer

Weights = Mapping[str, torch.Tensor]
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Prompt:
    """Where the tokens of a prefill [b, T] belong.

    Attributes:
        rows, slots: the part of the caches they fill.
        positions: [b, T] rotary positions; a padding token has 0.
        mask: boolean [b, 1, T, T], true where a query may look, or None: causal and nothing padded.
        real: boolean [b, T], false for padding, or None: nothing is padded.
    """

    rows: slice
    slots: slice
    positions: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor | None = None


@dataclass
class Moment:
    """Where the tokens of one step belong; all tensors live on the device and are read there.

    Attributes:
        slot: [1] int64, where every row writes; length: [1] int64, slot + 1.
        start: [B] int64, first slot of a row; positions: [B] int64, slot - start.
    """

    slot: torch.Tensor
    length: torch.Tensor
    start: torch.Tensor
    positions: torch.Tensor


class Mixer:
    """One layer's mixer: widths from the architecture, weights and rotary tables of the layer, its cache."""

    def __init__(self, arch: Mapping[str, Any], index: int, weights: Weights, tables: Tables | None) -> None:
        self.w, self.tables, self.eps = weights, tables, arch["rms_norm_eps"]
        self.heads = arch["num_attention_heads"]

    def allocate(self, rows: int, slots: int, **where: object) -> LayerCache:
        """A cache for so many rows and slots; `where`: dtype and device."""
        raise NotImplementedError

    def prefill(self, x: torch.Tensor, prompt: Prompt, cache: Any) -> torch.Tensor:
        """Output [b, T, D] for normalised hidden states [b, T, D]; fills the cache."""
        raise NotImplementedError

    def step(self, x: torch.Tensor, now: Moment, cache: Any) -> torch.Tensor:
        """Output [B, D] for one token a row [B, D]; writes its slot of the cache. No host sync."""
        raise NotImplementedError

    def _project(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[name], self.w.get(f"{name}_bias"))

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [b, n, T, d] rotated at positions [b, T]."""
        cos, sin = (F.embedding(positions, table).unsqueeze(1) for table in self.tables)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin


class FullAttention(Mixer):
    """Grouped-query attention."""

    def __init__(self, arch: Mapping[str, Any], index: int, weights: Weights, tables: Tables) -> None:
        super().__init__(arch, index, weights, tables)
        self.shared, self.width = arch["num_key_value_heads"], arch["head_dim"]
        self.scale = self.width**-0.5
        self.norms = (weights.get("q_norm"), weights.get("k_norm"))

    def allocate(self, rows: int, slots: int, **where: object) -> KeyValueCache:
        return KeyValueCache(rows, self.shared, slots, self.width, **where)

    def prefill(self, x: torch.Tensor, prompt: Prompt, cache: KeyValueCache) -> torch.Tensor:
        heads = self._project(x, "qkv").unflatten(-1, (-1, self.width))
        query, key, value = heads.split((self.heads, self.shared, self.shared), dim=2)
        if self.norms[0] is not None:
            query, key = (rms_norm(part, w, self.eps)[0] for part, w in zip((query, key), self.norms, strict=True))
        query, key = (self._turn(part.transpose(1, 2), prompt.positions) for part in (query, key))
        value = value.transpose(1, 2)
        cache.write(prompt.rows, prompt.slots, key, value)
        return self._project(_attend(query, key, value, prompt.mask, self.scale), "o")

    def step(self, x: torch.Tensor, now: Moment, cache: KeyValueCache) -> torch.Tensor:
        qkv = self._project(x, "qkv")
        query = rotary_cache(
            qkv, *self.tables, now.positions, now.slot, cache.keys, cache.values, *self.norms, eps=self.eps
        )
        mixed = decode_attention(query, cache.keys, cache.values, now.start, now.length, self.scale)
        return self._project(mixed.flatten(1), "o")


class LatentAttention(Mixer):
    """Latent attention: prompts with keys and values expanded, steps in latent space."""

    def __init__(self, arch: Mapping[str, Any], index: int, weights: Weights, tables: Tables) -> None:
        super().__init__(arch, index, weights, tables)
        self.rank = per_layer(arch["kv_lora_rank"], index)
        self.nope, self.rope, self.value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
        self.scale = (arch["query_pre_attn_scalar"] or arch["head_dim"]) ** -0.5
        self.shared, self.width = arch["num_key_value_heads"], arch["head_dim"]

    def allocate(self, rows: int, slots: int, **where: object) -> LatentCache:
        return LatentCache(rows, slots, self.rank, self.rope, **where)

    def prefill(self, x: torch.Tensor, prompt: Prompt, cache: LatentCache) -> torch.Tensor:
        q_nope, q_rope, kv = self._queries(x)
        latent, k_rope = kv.split((self.rank, self.rope), dim=-1)
        if (norm := self.w.get("kv_norm")) is not None:
            latent = rms_norm(latent.contiguous(), norm, self.eps)[0]
        q_rope = self._turn(q_rope.transpose(1, 2), prompt.positions)
        k_rope = self._turn(k_rope.unsqueeze(1), prompt.positions)  # [b, 1, T, d_r]
        cache.write(prompt.rows, prompt.slots, latent, k_rope.squeeze(1))
        k_nope, value = (
            F.linear(latent, self.w[name].flatten(0, 1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("to_key", "to_value")
        )
        query = torch.cat((q_nope.transpose(1, 2), q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)
        # Fused kernels want one width; zero columns change neither the scores nor the values.
        width = max(key.shape[-1], self.value)
        query, key, value = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
        mixed = _attend(query, key, value, prompt.mask, self.scale)
        return self._project(mixed.unflatten(-1, (self.heads, -1))[..., : self.value].flatten(2), "o")

    def step(self, x: torch.Tensor, now: Moment, cache: LatentCache) -> torch.Tensor:
        q_nope, q_rope, kv = self._queries(x)
        latent_cache(
            kv, *self.tables, now.positions, now.slot, cache.latents, cache.rope, self.w.get("kv_norm"), eps=self.eps
        )
        q_rope = rotate(q_rope, *self.tables, now.positions)
        query = torch.bmm(q_nope.transpose(0, 1), self.w["to_key"]).transpose(0, 1)  # [B, H, r]
        mixed = mla_decode(query, q_rope, cache.latents, cache.rope, now.start, now.length, self.scale)
        value = torch.bmm(mixed.transpose(0, 1), self.w["to_value"].transpose(1, 2)).transpose(0, 1)  # [B, H, d_v]
        return self._project(value.flatten(1), "o")

    def _queries(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Both parts of the queries [..., H, ·], and latent with rotary key [..., r + d_r] as projected."""
        if "q_map" in self.w:
            return self._normalised(x)
        both = self._project(x, "q_kv")
        query, kv = both.split((both.shape[-1] - self.rank - self.rope, self.rank + self.rope), dim=-1)
        if "q_b" in self.w:
            if (norm := self.w.get("q_norm")) is not None:
                query = rms_norm(query.contiguous(), norm, self.eps)[0]
            query = self._project(query, "q_b")
        q_nope, q_rope = query.unflatten(-1, (self.heads, -1)).split((self.nope, self.rope), dim=-1)
        return q_nope, q_rope, kv

    def _normalised(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of a source with QK-norm: heads are normalised, then mapped and compressed."""
        both, keys = self._project(x, "q_k"), self.shared * self.width
        query, key = both.split((both.shape[-1] - keys, keys), dim=-1)
        if "q_b" in self.w:
            query = self._project(query, "q_b")
        query, key = (
            rms_norm(part.unflatten(-1, (-1, self.width)).contiguous(), self.w[f"head_{name}_norm"], self.eps)[0]
            for name, part in (("q", query), ("k", key))
        )
        kv = self._project(torch.cat((x, key.flatten(-2)), dim=-1), "kv")
        query = query.unflatten(-2, (self.shared, -1)) @ self.w["q_map"].transpose(1, 2)  # [..., G, H/G, d_n + d_r]
        q_nope, q_rope = query.flatten(-3, -2).split((self.nope, self.rope), dim=-1)
        return q_nope, q_rope, kv


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of a prompt: query [b, H, T, d], key and value [b, G, T, d] to [b, T, H·d]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # Not every fused kernel takes grouped heads together with a mask.
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return mixed.transpose(1, 2).flatten(2)
