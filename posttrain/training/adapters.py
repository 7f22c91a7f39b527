"""Low-rank adapters: their settings, their number by formula, and how a trainer gets them.

Legend: D hidden_size, I intermediate_size, H query heads, G KV heads, d_h head_dim, r latent rank,
d_n/d_r/d_v position-free key, rotary key and value width of a latent-attention head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from posttrain.errors import Problem
from posttrain.models.architecture import mixers, per_layer

if TYPE_CHECKING:
    from peft import LoraConfig


class LoraSettings(BaseModel):
    """Low-rank adapters (arXiv:2106.09685) through peft, merged into the weights that are saved."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    r: int = Field(16, ge=1, description="Rank of an adapter.")
    alpha: float = Field(32.0, gt=0, description="An adapter's product is multiplied by alpha / r.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="Ends of the names of the linear layers that get an adapter, e.g. [q_proj, v_proj]; all-linear: "
        "every one but the output head.",
    )


def peft_config(lora: LoraSettings) -> LoraConfig:
    """peft's form of the settings; no dropout, so that a step draws no random numbers."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.target_modules,
    )


def target_problems(lora: LoraSettings | None, arch: Mapping[str, Any]) -> list[Problem]:
    """Named layers that the model does not have."""
    if lora is None or lora.target_modules == "all-linear":
        return []
    names = {name for layer in range(arch["num_hidden_layers"]) for name in linear_layers(arch, layer)}
    unknown = [name for name in lora.target_modules if name not in names]
    if not unknown:
        return []
    problem = f"the model has no layers {', '.join(unknown)}; it has {', '.join(sorted(names))}"
    return [Problem(problem, where="lora.target_modules", fix="lora.target_modules=all-linear")]


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
    if mixers(arch)[layer] == "mamba2":
        return {"in_proj": (width, 2 * queries + 2 * keys + heads), "out_proj": (queries, width), **mlp}
    if mixers(arch)[layer] == "full_attention":
        attention = {name: (width, keys) for name in ("k_proj", "v_proj")}
        return {"q_proj": (width, queries), **attention, "o_proj": (queries, width), **mlp}
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    rank, query_rank = per_layer(arch["kv_lora_rank"], layer), per_layer(arch.get("q_lora_rank"), layer)
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
