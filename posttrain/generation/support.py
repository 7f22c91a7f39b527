"""Which models the decoder knows: their configuration, their modules, and weights that are whole and plain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import PosttrainError
from posttrain.generation.mixers import MIXERS
from posttrain.models.architecture import mixers, normalise, per_layer

MOST_WIDTH = 512
"""Widest key of `decode_attention`'s kernels, and widest latent of `mla_decode`'s."""
PROJECTIONS = ("_proj", "_with_mqa", "lm_head")
"""How the names of the modules end whose weights are copied: nothing else that they do would be seen."""


def unsupported(model: PreTrainedModel) -> str | None:
    """Why the decoder cannot run this model, or None if it can."""
    try:
        arch = normalise(model.config.to_dict())
    except PosttrainError as error:
        return error.problems[0].what
    if "counted_as" in arch:
        return f"a model of type {arch['model_type']}, whose modules belong to an installed package"
    return (
        _unknown_mixers(arch)
        or _unknown_settings(arch)
        or _unknown_layout(model)
        or _too_wide(model, arch)
        or _replaced_modules(model)
        or _sharded(model)
        or _other_shapes(model, arch)
    )


def _unknown_mixers(arch: Mapping[str, Any]) -> str | None:
    unknown = sorted(set(mixers(arch)) - set(MIXERS))
    return f"layers of kind {', '.join(unknown)}, which have no decoder yet" if unknown else None


def _unknown_settings(arch: Mapping[str, Any]) -> str | None:
    if arch["rope_parameters"]["rope_type"] == "dynamic":
        return "rope_type 'dynamic': its frequencies change with the length of the text"
    if arch["hidden_act"] not in ("silu", "swish"):
        return f"hidden_act {arch['hidden_act']!r} (supported: silu)"
    return None


def _unknown_layout(model: PreTrainedModel) -> str | None:
    if hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "rotary_emb"):
        return None
    return f"a {type(model).__name__}, which is not a causal language model of transformers' layout"


def _too_wide(model: PreTrainedModel, arch: Mapping[str, Any]) -> str | None:
    latent = [index for index, kind in enumerate(mixers(arch)) if kind == "latent_attention"]
    ranks = [per_layer(arch["kv_lora_rank"], index) for index in latent]
    widest = max(arch["head_dim"], *ranks, arch["qk_rope_head_dim"] if latent else 0)
    if model.device.type == "cuda" and widest > MOST_WIDTH:
        return f"keys {widest} wide (at most {MOST_WIDTH} on a GPU)"
    return None


def _replaced_modules(model: PreTrainedModel) -> str | None:
    """An adapter or a quantised layer keeps a `weight` that can be copied, and computes something else."""
    known = [(name, module, nn.Linear) for name, module in model.named_modules() if name.endswith(PROJECTIONS)]
    for name, module, kind in [*known, ("the input embedding", model.get_input_embeddings(), nn.Embedding)]:
        if type(module) is not kind:
            found = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"{name} is a {found} (merge the adapter, or take the quantisation off)"
    return None if model.lm_head.bias is None else "a bias of lm_head"


def _sharded(model: PreTrainedModel) -> str | None:
    for name, parameter in model.named_parameters():
        # What a DTensor has and no other tensor: importing torch.distributed for the name alone takes long.
        if hasattr(parameter, "device_mesh") or not parameter.numel():
            return f"sharded weights: {name} is not whole on this process (gather the model first)"
    return None


def _other_shapes(model: PreTrainedModel, arch: Mapping[str, Any]) -> str | None:
    whole = (arch["vocab_size"], arch["hidden_size"])
    expected = [("embed_tokens", model.get_input_embeddings(), whole), ("lm_head", model.lm_head, whole)]
    for index, (layer, kind) in enumerate(zip(model.model.layers, mixers(arch), strict=True)):
        for name, shape in _shapes(arch, kind, index).items():
            expected.append((f"layers.{index}.{name}", layer.get_submodule(name), shape))
    for name, module, shape in expected:
        if tuple(module.weight.shape) != shape:
            found = f"{name} is {list(module.weight.shape)}, its configuration says {list(shape)}"
            return f"weights that are not whole: {found} (gather a sharded model first)"
    return None


def _shapes(arch: Mapping[str, Any], kind: str, index: int) -> dict[str, tuple[int, int]]:
    """[out, in] of the projections of a layer."""
    width, inner = arch["hidden_size"], arch["intermediate_size"]
    shapes = {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    makers = {"latent_attention": lambda: _latent_shapes(arch, index), "mamba2": lambda: _state_shapes(arch)}
    mixer = makers.get(kind, lambda: _full_shapes(arch))()
    return shapes | {f"self_attn.{name}": shape for name, shape in mixer.items()}


def _full_shapes(arch: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    width, query = arch["hidden_size"], arch["num_attention_heads"] * arch["head_dim"]
    key = (arch["num_key_value_heads"] * arch["head_dim"], width)
    return {"q_proj": (query, width), "k_proj": key, "v_proj": key, "o_proj": (width, query)}


def _state_shapes(arch: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    width, heads = arch["hidden_size"], arch["num_attention_heads"]
    inner, shared = heads * arch["head_dim"], arch["num_key_value_heads"] * arch["head_dim"]
    return {"in_proj": (2 * inner + 2 * shared + heads, width), "out_proj": (width, inner)}


def _latent_shapes(arch: Mapping[str, Any], index: int) -> dict[str, tuple[int, int]]:
    width, heads = arch["hidden_size"], arch["num_attention_heads"]
    rank, query_rank = per_layer(arch["kv_lora_rank"], index), per_layer(arch["q_lora_rank"], index)
    nope, rope, value = arch["qk_nope_head_dim"], arch["qk_rope_head_dim"], arch["v_head_dim"]
    query = heads * (arch["head_dim"] if arch["qk_norm"] else nope + rope)
    keys = arch["num_key_value_heads"] * arch["head_dim"] if arch["qk_norm"] else 0
    shapes = {
        "kv_a_proj_with_mqa": (rank + rope, width + keys),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (width, heads * value),
        **({"k_proj": (keys, width)} if keys else {}),
    }
    if query_rank is None:
        return shapes | {"q_proj": (query, width)}
    return shapes | {"q_a_proj": (query_rank, width), "q_b_proj": (query, query_rank)}
