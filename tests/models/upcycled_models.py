"""Tiny upcycled models with random mixers, for the tests of this folder."""

from __future__ import annotations

import torch
from source_models import make_source

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM
from posttrain.models.upcycling import build_upcycled

MLA = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
PAD = 258

YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS = {
    "plain": {},
    "wide keys": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
    "wide values": {"v_head_dim": 24},
    "no position-free part": {"qk_nope_head_dim": 0, "qk_rope_head_dim": 16},
    "low-rank query": {"q_lora_rank": 12},
    "latent norms": {"q_lora_rank": 12, "qk_latent_layernorm": True},
    "own scale": {"query_pre_attn_scalar": 5.0},
    "chosen frequencies": {"rope_frequency_indices": [7, 0, 3, 1]},
    "biases": {"attention_bias": True, "latent_bias": True, "latent_out_bias": True},
    "ranks by layer": {"kv_lora_rank": [40, 6], "q_lora_rank": [None, 10]},
    "all heads' rotary keys": {
        "qk_nope_head_dim": 0,
        "qk_rope_head_dim": 32,
        "rope_frequency_indices": [*range(8)] * 2,
    },
    "own rotary settings": {"latent_rope_parameters": YARN},
    "qk norm": {"family": "qwen3"},
    "qk norm, low-rank query": {"family": "qwen3", "q_lora_rank": [None, 10], "kv_lora_rank": [40, 6]},
    "qk norm, biases": {"source": {"family": "qwen3", "attention_bias": True}, "latent_bias": True},
    "beside full attention": {"mixers": ["full_attention", "latent_attention"], "kv_lora_rank": [None, 24]},
}
"""Fields of `make_latent` that between them use every feature of latent attention."""


def make_latent(
    family: str = "llama", *, mixers: list[str] | None = None, source=None, **fields
) -> UpcycledForCausalLM:
    """A source with latent attention in the given layers (default: all), its new parameters random."""
    source = make_source(**source) if isinstance(source, dict) else source or make_source(family)
    mixers = mixers or ["latent_attention"] * source.config.num_hidden_layers
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=mixers, **{**MLA, **fields}))
    fill_new_mixers(model)
    return model.eval()


def fill_new_mixers(model: UpcycledForCausalLM, seed: int = 1) -> None:
    """Random values for every parameter that `build_upcycled` left to the caller; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.isnan().any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.14 * noise)


def token_ids(rows: int = 2, length: int = 13, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Ids and mask of a left-padded batch, and the single rows."""
    rows = [token_ids(1, length, seed=length)[0] for length in lengths]
    width = max(lengths)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return ids, mask, rows
