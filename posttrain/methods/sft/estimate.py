"""What fine-tuning takes, by formula: the head's tiles and the adapters; the rest is `posttrain.training.estimate`.

Legend: D hidden_size, I intermediate_size, H query heads, G KV heads, d_h head_dim, r latent rank,
d_n/d_r/d_v position-free key, rotary key and value width of a latent-attention head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.methods.sft.config import LoraSettings
from posttrain.models.architecture import mixers, per_layer

TILE_TOKENS, TILE_ENTRIES, TILES = 4096, 32768, 3
"""TRL's chunked head: tokens by vocabulary entries of a tile, in fp32, and how many exist at once."""


def head_bytes(arch: Mapping[str, Any], micro_batch_tokens: int) -> int:
    """Peak bytes of TRL's chunked head: its tiles, the head in fp32 and its gradient."""
    tiles = TILES * min(TILE_TOKENS, micro_batch_tokens) * TILE_ENTRIES
    return 4 * (tiles + 2 * arch["vocab_size"] * arch["hidden_size"])


def adapter_parameters(arch: Mapping[str, Any], lora: LoraSettings) -> int:
    """Parameters of the adapters: r (in + out) for every linear layer that gets one."""
    return sum(
        lora.r * sum(shape)
        for layer in range(arch["num_hidden_layers"])
        for name, shape in linear_layers(arch, layer).items()
        if lora.target_modules == "all-linear" or name in lora.target_modules
    )


def linear_layers(arch: Mapping[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """Name and (in, out) of a decoder layer's linear layers."""
    width, inner, heads = arch["hidden_size"], arch["intermediate_size"], arch["num_attention_heads"]
    mlp = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    keys, queries = arch["num_key_value_heads"] * arch["head_dim"], heads * arch["head_dim"]
    if mixers(arch)[layer] != "latent_attention":
        attention = {name: (width, keys) for name in ("k_proj", "v_proj")}
        return {"q_proj": (width, queries), **attention, "o_proj": (queries, width), **mlp}
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    rank, query_rank = per_layer(arch["kv_lora_rank"], layer), arch.get("q_lora_rank")
    normed = bool(arch.get("qk_norm"))
    out = queries if normed else heads * (nope + rope)
    latent = {"q_proj": (width, out)}
    if query_rank:
        latent = {"q_a_proj": (width, query_rank), "q_b_proj": (query_rank, out)}
    if normed:
        latent["k_proj"] = (width, keys)
    latent["kv_a_proj_with_mqa"] = (width + keys if normed else width, rank + rope)
    latent["kv_b_proj"] = (rank, heads * (nope + value))
    return {**latent, "o_proj": (heads * value, width), **mlp}
