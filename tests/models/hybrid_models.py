"""Tiny hybrids of the method card's size (D 64, H 8, d_h 8) with random mixers, for the tests of this folder."""

from __future__ import annotations

import torch
from source_models import make_source

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM
from posttrain.models.upcycling import build_upcycled

LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
ORDERS = {
    "state first": ("mamba2", "latent_attention", "mamba2", "full_attention"),
    "attention first": ("full_attention", "mamba2", "mamba2", "latent_attention"),
    "states alone": ("mamba2", "mamba2"),
}
VARIANTS = {
    "4 heads share": {"kv_heads": 2},
    "2 heads share": {"kv_heads": 4},
    "none share": {"kv_heads": 8},
    "own taps": {"kv_heads": 2, "mamba_repeat_before_conv": True},
    "no activation": {"mamba_conv_activation": False},
    "no norm": {"mamba_norm": False},
    "biases": {"mamba_bias": True, "mamba_out_bias": True},
    "longer convolution": {"mamba_conv_kernel": 6},
    "no convolution": {"mamba_conv_kernel": 1},
    "qk norm": {"family": "qwen3"},
    "qk norm, biases, own taps": {"family": "qwen3", "mamba_bias": True, "mamba_repeat_before_conv": True},
}
"""Fields of `make_hybrid` that between them use every feature of the mixer."""


def make_hybrid(
    mixers: tuple[str, ...] = ("mamba2",),
    family: str = "llama",
    kv_heads: int = 2,
    head_dim: int = 8,
    of_source: dict | None = None,
    **fields,
) -> UpcycledForCausalLM:
    """A source, changed as `of_source` says, with these mixers, everything new random."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    source = make_source(family, num_hidden_layers=len(mixers), **heads, **(of_source or {}))
    latent = LATENT if "latent_attention" in mixers else {}
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=list(mixers), **latent, **fields))
    fill_mixers(model)
    return model.eval()


def fill_mixers(model: UpcycledForCausalLM, seed: int = 1) -> None:
    """Random values for every parameter that is NaN; states remember from one to some hundreds of tokens."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.isnan().any():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("A_log"):
                parameter.copy_(1.5 * noise - 1.5)
            elif name.endswith(("dt_bias", ".D")):
                parameter.copy_(noise - 1)
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if "conv1d" in name else 0.14) * noise)
