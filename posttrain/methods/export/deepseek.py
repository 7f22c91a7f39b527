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

from posttrain.errors import RecipeError, StageError
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.exact import largest, latent_eps, obstacles, stock_rope
from posttrain.models.architecture import normalise

_COPIED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings attention_dropout qk_nope_head_dim qk_rope_head_dim v_head_dim dtype"
).split()
FRACTION_BITS = 24
"""Of fp32: a relative error of 2^-25 is half a unit in the last place."""
SMALLEST = 2.0**-100
"""Far enough above the smallest normal number (2^-126) of fp32 and bf16 that scaled weights keep their precision."""


@torch.no_grad()
def to_deepseek(model: PreTrainedModel, cfg: ExportConfig, *, linearise: bool = True) -> DeepseekV3ForCausalLM:
    """The same function in stock classes; fp32 arithmetic, the source's dtype and device are kept.

    `linearise=False` leaves the latents unscaled and the norm weights one: for measurements with Identity norms.

    Raises:
        RecipeError: it would not be the same function.
    """
    arch = normalise(model.config.to_dict())
    if problems := obstacles(arch, cfg, str(model.dtype)):
        raise RecipeError(problems=problems)
    config = _config(model.config, stock_rope(arch))
    with torch.device(model.device), no_init_weights():
        stock = DeepseekV3ForCausalLM._from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    bits = scale_bits(model, cfg) if linearise and not model.config.qk_latent_layernorm else None
    state = dict(model.state_dict())
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        block = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        block = _attention(block, model.config, config)
        if not model.config.qk_latent_layernorm:
            block |= _norms(block, config, cfg, bits)
        state |= {prefix + name: tensor for name, tensor in block.items()}
    stock.load_state_dict(state)
    stock.tie_weights()
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


@torch.no_grad()
def scale_bits(model: PreTrainedModel, cfg: ExportConfig) -> int:
    """`norm_scale_bits`, or the fewest with which no input makes a latent norm differ from a constant in fp32.

    A block's input is an RMS-normed vector: x = g·u with |u|² <= D. A latent W x then has a mean square of at most
    M = |W diag(g)|_F² D / r, and a norm of eps is the constant eps^(-1/2) up to a factor 1 - s² M / (2 eps).

    Raises:
        RecipeError: latents so large that scaled weights would leave the range of fp32 and bf16.
    """
    if cfg.norm_scale_bits is not None:
        return cfg.norm_scale_bits
    eps, bits, smallest = latent_eps(model.config.rms_norm_eps, cfg.loader), 16, math.inf
    for layer in model.model.layers:
        gain, rope = layer.input_layernorm.weight.double(), model.config.qk_rope_head_dim
        downs = [layer.self_attn.kv_a_proj_with_mqa.weight[:-rope]]
        downs += [layer.self_attn.q_a_proj.weight] if layer.self_attn.query_rank is not None else []
        for down in downs:
            square = (down.double() * gain).square().sum().item() * down.shape[1] / len(down)
            if not math.isfinite(square):
                fix = "look at the stage that made the model"
                raise StageError("weights that are not finite", "to=deepseek_v3", fix)
            bits = max(bits, math.ceil(math.log2(max(square, eps) * 2.0**FRACTION_BITS / eps) / 2))
            smallest = min(smallest, down.double().square().mean().sqrt().item() or math.inf)
    if not smallest * 2.0**-bits >= SMALLEST:
        raise RecipeError(
            f"latents this large need norm_scale_bits={bits}, and weights of {smallest:.1e} times 2^-{bits} leave the "
            "range of fp32 and bf16",
            where="to=deepseek_v3",
            fix="use to=native",
        )
    return bits


def _config(source: Any, rope: dict[str, Any]) -> DeepseekV3Config:
    config = DeepseekV3Config(
        **{name: getattr(source, name) for name in _COPIED},
        num_key_value_heads=source.num_attention_heads,
        kv_lora_rank=largest(source.kv_lora_rank),
        q_lora_rank=largest(source.q_lora_rank),
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
    # Loaders from before `rope_parameters` look here and would take 10000 otherwise.
    config.rope_theta = rope["rope_theta"]
    return config


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


def _norms(block: dict[str, Tensor], config: Any, cfg: ExportConfig, bits: int | None) -> dict[str, Tensor]:
    """Epsilon-linearised norms: latents times s, weight sqrt(eps)/s, so that the divisor is the constant sqrt(eps).

    `bits` None leaves both one.
    """
    s = 1.0 if bits is None else 2.0**-bits
    weight = 1.0 if bits is None else math.sqrt(latent_eps(config.rms_norm_eps, cfg.loader)) / s
    down = block["kv_a_proj_with_mqa.weight"].clone()
    down[: config.kv_lora_rank] *= s
    made = {"kv_a_proj_with_mqa.weight": down, "kv_a_layernorm.weight": down.new_full((config.kv_lora_rank,), weight)}
    if config.q_lora_rank is not None:
        made["q_a_proj.weight"] = block["q_a_proj.weight"] * s
        made["q_a_layernorm.weight"] = down.new_full((config.q_lora_rank,), weight)
    return made
