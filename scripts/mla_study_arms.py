"""The arms of the initialisation study: settings of `mla_upcycle`, the same rotary width and budgets for all."""

from __future__ import annotations

from typing import Any

ROPE_DIM = 16
"""d_r of every arm: a quarter of SmolLM2's heads."""
BUDGETS = (208, 96, 64)
"""r + d_r, of 384 elements that the source caches per token and layer: 54, 25 and 16.7 %."""

_ROROPE = {"rotary_plan": "rorope", "freqfold": 4}
ARMS: dict[str, dict[str, Any]] = {
    "xeco": {"rotary_plan": "xeco"},
    "paired": {
        "rotary_plan": "paired",
        "rotary_pairs": "uniform",
        "shared_key": "mean",
        "latent_plan": "svd",
        "objective": "weight",
    },
    "rorope_pca": {**_ROROPE, "latent_plan": "pca", "objective": "activation"},
    "rorope_bkv": {**_ROROPE, "latent_plan": "bkv", "objective": "activation"},
    "activation_aware": {
        **_ROROPE,
        "latent_plan": "bkv",
        "objective": "attention",
        "rank_allocation": "water_fill",
    },
    "attention_uniform": {**_ROROPE, "latent_plan": "bkv", "objective": "attention"},
    "activation_filled": {
        **_ROROPE,
        "latent_plan": "bkv",
        "objective": "activation",
        "rank_allocation": "water_fill",
    },
    "fastest": {"rotary_plan": "paired", "latent_plan": "bkv", "objective": "activation"},
    "fastest_32": {"rotary_plan": "paired", "latent_plan": "bkv", "objective": "activation", "qk_rope_head_dim": 32},
}
"""`xeco`: as published. `paired`: whole rotary pairs, mean key, SVD of the weights. `rorope_*`: TransMLA's key, plain
or balanced PCA of activations. `activation_aware`: the same key, errors weighted by queries and output projection,
ranks water-filled over the layers; `attention_uniform` and `activation_filled` make one of its two changes each.
`fastest`: the fastest pairs and a principal key; `fastest_32` with a rotary key twice as wide at the same budget."""


def settings(arm: str, budget: int) -> dict[str, Any]:
    """Fields of `MlaUpcycleConfig`: `budget` cached elements per token and layer, on average over the layers."""
    fields = {"qk_rope_head_dim": ROPE_DIM, "rank_multiple": 16, **ARMS[arm]}
    return {**fields, "kv_lora_rank": budget - fields["qk_rope_head_dim"]}
