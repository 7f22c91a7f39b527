"""Peak memory by terms, from shapes alone. Formulas hold to about a fifth; the plan shows the measurement beside them.

Legend: D hidden_size, I intermediate_size, V vocab_size, L layers, H query heads, G KV heads, d_h head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.models.architecture import (
    cache_bytes_per_token,
    mixer_parameters,
    mixers,
    parameter_count,
    per_layer,
)

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2}
ADAM_MOMENTS = 2


def trainable_parameters(arch: Mapping[str, Any], trainable: str) -> int:
    """Parameters that receive gradients: `all`, or those of the token `mixers`."""
    if trainable == "all":
        return parameter_count(arch)
    return sum(mixer_parameters(arch, layer) for layer in range(arch["num_hidden_layers"]))


def training_memory(
    arch: Mapping[str, Any],
    trainable: int,
    micro_batch_tokens: int,
    chunk_tokens: int,
    master_bytes: int = 4,
    *,
    precision: str = "fp32",
    gradient_checkpointing: bool = False,
    logit_copies: int = 3,
    teacher: Mapping[str, Any] | None = None,
    teacher_bytes: int = 4,
) -> dict[str, int]:
    """Bytes of every term of a training step's peak under AdamW; their sum is the peak.

    Args:
        trainable: parameters with gradients; `master_bytes` per element of weights, gradients and moments.
        micro_batch_tokens: tokens of one forward pass; `chunk_tokens`: of these, tokens whose logits exist at a time.
        precision: `fp32`, or `bf16` autocast, which keeps most activations in 2 bytes.
        logit_copies: fp32 `[chunk, V]` tensors alive at once in the loss.
        teacher: architecture of a frozen second model held beside it, with `teacher_bytes` per element.
    """
    head = arch["vocab_size"] * arch["hidden_size"]
    chunk = min(chunk_tokens, micro_batch_tokens)
    terms = {
        "weights": master_bytes * parameter_count(arch),
        "gradients": master_bytes * trainable,
        "optimizer": ADAM_MOMENTS * master_bytes * trainable,
        "activations": micro_batch_tokens * activation_bytes_per_token(arch, precision, gradient_checkpointing),
        "logits": 4 * (logit_copies * chunk * arch["vocab_size"] + 2 * head),
    }
    if teacher is not None:
        terms["teacher"] = teacher_bytes * parameter_count(teacher) + micro_batch_tokens * _forward_bytes(teacher, 4)
    return terms


def inference_memory(arch: Mapping[str, Any], tokens: int, batch: int, element_size: int) -> dict[str, int]:
    """Bytes of every term of a forward pass over `batch` sequences of `tokens` tokens with a full cache and logits."""
    return {
        "weights": element_size * parameter_count(arch),
        "cache": batch * tokens * cache_bytes_per_token(arch, element_size),
        "activations": batch * tokens * _forward_bytes(arch, element_size),
        "logits": 4 * batch * tokens * arch["vocab_size"],
    }


def activation_bytes_per_token(arch: Mapping[str, Any], precision: str, gradient_checkpointing: bool) -> int:
    """Bytes a token leaves for the backward pass, all layers, with an attention that keeps no `[T, T]` matrix.

    Counted from what autograd saves in transformers' Llama: per layer in fp32 6 D (norms and the inputs of the
    products), 2 H d_h, 2 G d_h, 4 I elements; under bf16 autocast the products' inputs take 2 bytes.
    """
    layers = [_layer_bytes(arch, layer, precision) for layer in range(arch["num_hidden_layers"])]
    ends = 4 * 4 * arch["hidden_size"]  # final norm, hidden states, their gradient
    if gradient_checkpointing:
        return ends + 4 * arch["hidden_size"] * len(layers) + max(layers)
    return ends + sum(layers)


def _layer_bytes(arch: Mapping[str, Any], layer: int, precision: str) -> int:
    query, key_value = _attention_widths(arch, layer)
    width, inner = arch["hidden_size"], arch["intermediate_size"]
    if precision == "bf16":
        return 26 * width + 2 * (2 * query + key_value + 4 * inner)
    return 4 * (6 * width + 2 * query + key_value + 4 * inner)


def _attention_widths(arch: Mapping[str, Any], layer: int) -> tuple[int, int]:
    """Widths of all query heads, and of all keys and values as attention sees them."""
    heads = arch["num_attention_heads"]
    if mixers(arch)[layer] == "latent_attention":
        key = arch["qk_nope_head_dim"] + arch["qk_rope_head_dim"]
        latent = per_layer(arch["kv_lora_rank"], layer) + arch["qk_rope_head_dim"]
        return heads * key, heads * (key + arch["v_head_dim"]) + latent
    return heads * arch["head_dim"], 2 * arch["num_key_value_heads"] * arch["head_dim"]


def _forward_bytes(arch: Mapping[str, Any], element_size: int) -> int:
    """Bytes a token needs within the widest layer of a forward pass that keeps nothing for a backward pass."""
    widest = max(sum(_attention_widths(arch, layer)) for layer in range(arch["num_hidden_layers"]))
    return element_size * (4 * arch["hidden_size"] + max(widest, 3 * arch["intermediate_size"]))
