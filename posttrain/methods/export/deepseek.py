"""An upcycled model with latent attention everywhere as transformers' stock DeepSeek-V3.

Legend: H heads, r latent rank, d_n/d_r/d_v position-free key, rotary key and value width.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from posttrain.errors import RecipeError
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.exact import latent_eps, obstacles, stock_rope
from posttrain.models.architecture import normalise

_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings attention_dropout qk_nope_head_dim qk_rope_head_dim v_head_dim dtype"
).split()


@torch.no_grad()
def to_deepseek(model: PreTrainedModel, cfg: ExportConfig, *, linearise: bool = True) -> DeepseekV3ForCausalLM:
    """The same function in stock classes; fp32 arithmetic, the source's dtype and device are kept.

    `linearise=False` leaves the latents unscaled and the norm weights one: for measurements with Identity norms.

    Raises:
        RecipeError: it would not be the same function.
    """
    arch = normalise(model.config.to_dict())
    if problems := obstacles(arch, cfg):
        raise RecipeError(problems=problems)
    config = _config(model.config, stock_rope(arch))
    with torch.device(model.device), no_init_weights():
        stock = DeepseekV3ForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    state = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        block = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        block = _attention(block, model.config, config)
        if not model.config.qk_latent_layernorm:
            block |= _norms(block, config, cfg, linearise)
        state |= {prefix + name: tensor for name, tensor in block.items()}
    stock.load_state_dict(state)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def _config(source: Any, rope: dict[str, Any]) -> DeepseekV3Config:
    config = DeepseekV3Config(
        **{name: getattr(source, name) for name in _COPIED},
        num_key_value_heads=source.num_attention_heads,
        kv_lora_rank=_largest(source.kv_lora_rank),
        q_lora_rank=_largest(source.q_lora_rank),
        first_k_dense_replace=source.num_hidden_layers,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        attention_bias=False,
        rope_interleave=True,
        rope_parameters=rope,
    )
    config.num_nextn_predict_layers = 0
    return config


def _largest(rank: int | list[int] | None) -> int | None:
    return max(rank) if isinstance(rank, list) and None not in rank else rank[0] if isinstance(rank, list) else rank


def _attention(block: dict[str, Tensor], source: Any, config: DeepseekV3Config) -> dict[str, Tensor]:
    """Interleaved rotary rows, stock softmax scale, ranks padded with zeros."""
    block = {name: tensor.clone() for name, tensor in block.items()}
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    # Entry i turns with i + d_r/2 here, with its neighbour there.
    order = torch.arange(rope, device=block["o_proj.weight"].device).view(2, -1).T.flatten()
    scale = math.sqrt((nope + rope) / (source.query_pre_attn_scalar or source.head_dim))
    query = "q_proj.weight" if "q_proj.weight" in block else "q_b_proj.weight"
    rows = block[query].unflatten(0, (config.num_attention_heads, nope + rope))
    block[query] = torch.cat((rows[:, :nope], rows[:, nope:][:, order]), dim=1).flatten(0, 1) * scale
    down = block["kv_a_proj_with_mqa.weight"]
    latent, key = down[:-rope], down[-rope:][order]
    extra = config.kv_lora_rank - len(latent)
    block["kv_a_proj_with_mqa.weight"] = torch.cat((pad(latent, (0, 0, 0, extra)), key))
    block["kv_b_proj.weight"] = pad(block["kv_b_proj.weight"], (0, extra))
    if config.q_lora_rank is not None:
        extra = config.q_lora_rank - len(block["q_a_proj.weight"])
        block["q_a_proj.weight"] = pad(block["q_a_proj.weight"], (0, 0, 0, extra))
        block["q_b_proj.weight"] = pad(block["q_b_proj.weight"], (0, extra))
    return block


def _norms(block: dict[str, Tensor], config: Any, cfg: ExportConfig, linearise: bool) -> dict[str, Tensor]:
    """Epsilon-linearised norms: latents times s, weight sqrt(eps)/s, so that the divisor is the constant sqrt(eps)."""
    s = 2.0**-cfg.norm_scale_bits if linearise else 1.0
    weight = math.sqrt(latent_eps(config.rms_norm_eps, cfg.loader)) / s if linearise else 1.0
    down = block["kv_a_proj_with_mqa.weight"].clone()
    down[: config.kv_lora_rank] *= s
    made = {"kv_a_proj_with_mqa.weight": down, "kv_a_layernorm.weight": down.new_full((config.kv_lora_rank,), weight)}
    if config.q_lora_rank is not None:
        made["q_a_proj.weight"] = block["q_a_proj.weight"] * s
        made["q_a_layernorm.weight"] = down.new_full((config.q_lora_rank,), weight)
    return made
