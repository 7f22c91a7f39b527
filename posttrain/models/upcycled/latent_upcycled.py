"""Multi-head latent attention: one latent and one rotary key per token are cached (DeepSeek-V2, arXiv 2405.04434).

Legend: B batch, T queries, S cached tokens, D hidden width, H query heads, G source KV heads, d_h head_dim,
r kv_lora_rank, d_n/d_r/d_v position-free key, rotary key and value width. Score of a head: q_nope·(W_K c) +
q_rope·k_rope, with the latent c [r] and one k_rope [d_r] for all heads.

Of a source with QK-norm (Qwen3) the keys are normalised before they are compressed: `k_norm` runs at write time; c and
k_rope are linear in the hidden state (the values' share) and in the normalised keys. A query head is normalised too,
then mapped by its group's `q_map`. What is cached and how it is read stay the same; at full rank nothing is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention_upcycled import attend
from .configuration_upcycled import UpcycledConfig
from .norm_upcycled import UpcycledRMSNorm
from .rotary_upcycled import apply_rotary

ABSORB_AT_MOST = 64
"""Longest query that is answered in latent space; it keeps the scores [B, H, T, S] of that path small."""


class LatentAttention(nn.Module):
    """Attention whose keys and values are rebuilt from a latent; caches r + d_r elements per token.

    Without a past the keys and values are expanded and go through the attention function of the config. A short query
    with a past is absorbed: the query is moved into latent space and the cache is read as it is.

    The source's attention factor (yarn) multiplies the rotary part only; a converter that wants it on the position-free
    part too has to scale those query rows.
    """

    def __init__(self, config: UpcycledConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.num_key_value_groups = config.num_attention_heads, 1
        self.rank = config.layer_value("kv_lora_rank", layer_idx)
        self.query_rank = config.layer_value("q_lora_rank", layer_idx)
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value_dim = config.v_head_dim
        self.scaling = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.is_causal = True
        self._make_projections(config)

    def _make_projections(self, config: UpcycledConfig) -> None:
        width, query = config.hidden_size, self.num_heads * (self.nope_dim + self.rope_dim)
        if config.qk_norm:
            query, keys = self.num_heads * config.head_dim, config.num_key_value_heads * config.head_dim
            self._make_qk_norm(config)
        if self.query_rank is None:
            self.q_proj = nn.Linear(width, query, bias=config.attention_bias)
        else:
            self.q_a_proj = nn.Linear(width, self.query_rank, bias=False)
            self.q_b_proj = nn.Linear(self.query_rank, query, bias=config.attention_bias)
        compressed = width + keys if config.qk_norm else width
        self.kv_a_proj_with_mqa = nn.Linear(compressed, self.rank + self.rope_dim, bias=config.latent_bias)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, width, bias=config.latent_out_bias)
        if config.qk_latent_layernorm:
            self.kv_a_layernorm = UpcycledRMSNorm(self.rank, config.rms_norm_eps)
            if self.query_rank is not None:
                self.q_a_layernorm = UpcycledRMSNorm(self.query_rank, config.rms_norm_eps)

    def _make_qk_norm(self, config: UpcycledConfig) -> None:
        shared, width = config.num_key_value_heads, config.head_dim
        self.q_norm = UpcycledRMSNorm(width, config.rms_norm_eps)
        self.q_map = nn.Parameter(torch.empty(shared, self.nope_dim + self.rope_dim, width))
        self.k_proj = nn.Linear(config.hidden_size, shared * width, bias=config.attention_bias)
        self.k_norm = UpcycledRMSNorm(width, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        q_nope, q_rope = self._queries(hidden_states)  # [B, H, T, d_n], [B, H, T, d_r]
        latent, k_rope = self._compress(hidden_states)  # [B, 1, T, r], [B, 1, T, d_r]
        q_rope, k_rope = apply_rotary(q_rope, *position_embeddings), apply_rotary(k_rope, *position_embeddings)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        if self._absorbs(hidden_states.shape[1], latent.shape[2], attention_mask):
            output = self._absorbed(q_nope, q_rope, latent, k_rope, attention_mask)
        else:
            output = self._expanded(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2))

    def _queries(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.query_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_a_proj(hidden_states)
            query = self.q_b_proj(self.q_a_layernorm(query) if self.config.qk_latent_layernorm else query)
        query = query.unflatten(-1, (self.num_heads, -1))
        if self.config.qk_norm:
            groups = self.q_norm(query).unflatten(2, (len(self.q_map), -1))  # [B, T, G, H/G, d_h]
            query = torch.einsum("btghd,gnd->btghn", groups, self.q_map).flatten(2, 3)
        query = query.transpose(1, 2)
        return query.split((self.nope_dim, self.rope_dim), dim=-1)

    def _compress(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.qk_norm:
            keys = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (len(self.q_map), -1)))
            hidden_states = torch.cat((hidden_states, keys.flatten(2)), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1).split((self.rank, self.rope_dim), dim=-1)
        return (self.kv_a_layernorm(latent) if self.config.qk_latent_layernorm else latent), k_rope

    def _absorbs(self, queries: int, tokens: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether latent space is cheaper: a short query that looks back (causality of a longer one needs the mask)."""
        # An adapter or a quantised layer in place of the projection has no single weight to absorb.
        if type(self.kv_b_proj) is not nn.Linear or queries == tokens or queries > ABSORB_AT_MOST:
            return False
        if queries > 1 and attention_mask is None:
            return False
        # Expanding costs S·r·(d_n + d_v) per head, scores in latent space T·S·(2r − d_n − d_v) more than in head space.
        width = self.nope_dim + self.value_dim
        return queries * (2 * self.rank - width) <= self.rank * width

    def _expanded(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keys and values of every head, then ordinary attention; [B, T, H, d_v]."""
        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split((self.nope_dim, self.value_dim), dim=-1)
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        # Fused kernels want one width; zero columns change neither the scores nor the values.
        width = max(key.shape[-1], self.value_dim)
        query, key, value = (nn.functional.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        return attend(self, query, key, value, attention_mask, **kwargs)[..., : self.value_dim]

    def _absorbed(
        self,
        q_nope: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same result without keys and values of any head; [B, T, H, d_v]. Dropout is not applied."""
        heads = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, d_n + d_v, r]
        to_key, to_value = heads.split((self.nope_dim, self.value_dim), dim=1)
        q_latent = torch.matmul(q_nope, to_key)  # [B, H, T, r]
        batch, _, queries, _ = q_latent.shape
        # One shared key: the heads are more rows of the same matrix product; the cache is neither copied nor repeated.
        scores = torch.bmm(q_rope.flatten(1, 2), k_rope.squeeze(1).transpose(1, 2))
        scores = torch.baddbmm(scores, q_latent.flatten(1, 2), latent.squeeze(1).transpose(1, 2))
        scores = _masked(scores.view(batch, self.num_heads, queries, -1).float() * self.scaling, attention_mask)
        weights = scores.softmax(dim=-1).to(latent.dtype)
        mixed = torch.matmul(weights.flatten(1, 2), latent.squeeze(1)).view(batch, self.num_heads, queries, self.rank)
        return torch.matmul(mixed, to_value.transpose(1, 2)).transpose(1, 2)


def _masked(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Apply a boolean (true: may look) or additive mask [B, 1, T, S] to fp32 scores."""
    if attention_mask is None:
        return scores
    mask = attention_mask[..., : scores.shape[-1]]
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
