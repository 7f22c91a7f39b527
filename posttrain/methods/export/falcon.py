"""A hybrid of `mamba2` and `full_attention` layers as transformers' stock FalconH1, one half of every layer zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import FalconH1Config, FalconH1ForCausalLM, PreTrainedModel
from transformers import __version__ as installed
from transformers.initialization import no_init_weights
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated

from posttrain.errors import RecipeError, StageError
from posttrain.methods.export.exact_falcon import attention_half, obstacles
from posttrain.models.architecture import normalise
from posttrain.models.stock_mamba2 import written_out
from posttrain.models.upcycled.mamba_upcycled import FP32

_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers max_position_embeddings initializer_range "
    "rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings attention_dropout head_dim "
    "mlp_bias dtype"
).split()
_RENAMED = {
    ".mlp.": ".feed_forward.",
    ".post_attention_layernorm.": ".pre_ff_layernorm.",
    "model.norm.": "model.final_layernorm.",
}


@torch.no_grad()
def to_falcon(model: PreTrainedModel) -> FalconH1ForCausalLM:
    """The same function in stock classes; fp32 arithmetic, the source's dtype and device are kept.

    The half that a layer does not use is zero throughout: attention of zero values is zero, and so is a normed state
    into which nothing was written. All of FalconH1's multipliers are one.

    Raises:
        RecipeError: it would not be the same function.
    """
    arch = normalise(model.config.to_dict())
    if problems := obstacles(arch):
        raise RecipeError(problems=problems)
    config = _config(model.config, attention_half(arch))
    with torch.device(model.device), no_init_weights():
        stock = FalconH1ForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    state = _tensors(model)
    for name, tensor in stock.state_dict().items():
        if name not in state and (".self_attn." in name or ".mamba." in name):
            state[name] = torch.zeros_like(tensor)
    stock.load_state_dict(state)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    # Of the files alone: transformers rounds these too when it loads the class in bf16.
    stock._keep_in_fp32_modules_strict = set(FP32)
    return stock.eval()


def decodes_batches() -> bool:
    """Whether the installed transformers keeps the axis of a single token in FalconH1's gated norm; 5.17 does not."""
    return FalconH1RMSNormGated(2)(torch.ones(1, 1, 2)).ndim == 3


def check_installed(config: Any) -> None:
    """Raises StageError if the installed FalconH1 is wrong for such a model: its export could not be checked."""
    if config.mamba_norm and not decodes_batches():
        what = f"transformers {installed} decodes batches of a FalconH1 with a gated norm wrongly"
        raise StageError(what, "to=falcon_h1", "install transformers 5.23 or newer, or use to=native")


def _config(source: Any, attention: dict[str, Any]) -> FalconH1Config:
    config = FalconH1Config(
        **{name: getattr(source, name) for name in _COPIED},
        hidden_act="silu",
        num_attention_heads=attention["num_attention_heads"],
        num_key_value_heads=attention["num_key_value_heads"],
        attention_bias=attention["attention_bias"],
        rope_parameters=dict(source.rope_parameters),
        mamba_d_ssm=source.num_attention_heads * source.head_dim,
        mamba_n_heads=source.num_attention_heads,
        mamba_d_head=source.head_dim,
        mamba_n_groups=source.num_attention_heads,
        mamba_d_state=source.head_dim,
        mamba_d_conv=source.mamba_conv_kernel,
        mamba_conv_bias=True,
        mamba_proj_bias=source.mamba_bias,
        mamba_norm_before_gate=False,
        mamba_rms_norm=source.mamba_norm,
        projectors_bias=source.mamba_out_bias,
    )
    # Loaders from before `rope_parameters` look here and would take another default otherwise.
    config.rope_theta = source.rope_parameters["rope_theta"]
    return config


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors by their stock names: mixers written out, attention and everything else as it is."""
    found = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _RENAMED.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    for index, layer in enumerate(model.model.layers):
        if model.config.mixers[index] == "mamba2":
            prefix = f"model.layers.{index}."
            found = {name: tensor for name, tensor in found.items() if not name.startswith(prefix + "self_attn.")}
            found |= {f"{prefix}mamba.{name}": tensor for name, tensor in written_out(layer.self_attn).items()}
    return found
