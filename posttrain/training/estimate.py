"""Peak memory by terms, from shapes alone. Formulas hold to about a fifth; the plan shows the measurement beside them.

Legend: D hidden_size, I intermediate_size, V vocab_size, L layers, H query heads, G KV heads, d_h head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.schema import SHARDED
from posttrain.models.architecture import (
    cache_bytes,
    mixer_parameters,
    mixers,
    parameter_count,
    per_layer,
)
from posttrain.pipeline.device import planned_ranks, planned_strategy
from posttrain.training.sharding.memory import sharded_memory, sharded_teacher

if TYPE_CHECKING:
    from posttrain.training.config import TrainingConfig

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2}
ADAM_MOMENTS = 2
LOGITS_BYTES = 480 * 2**20
"""Most that two fp32 buffers of logits take, `CHUNK_BYTES` of `posttrain_kernels.linear_kl` (which imports torch)."""
SCAN_CHUNK = 64
"""Tokens of a chunk of Mamba-2's scan, `CHUNK` of `posttrain_kernels.ssd_scan`."""

Kept = Literal["eager", "compiled", "lean"]
"""What a layer keeps for its backward pass: all that autograd saves; what torch's compiler saves; the same without what
pointwise operations can make again from it (normalised inputs, the gated product, bf16 copies of weights)."""


@dataclass(frozen=True)
class ActivationPlan:
    """What every layer keeps; how many of the first layers keep only their input and compute the rest again; and how
    many, those included, keep nothing of their feed-forward part."""

    kept: Kept = "eager"
    recomputed: int = 0
    recomputed_mlps: int = 0


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
    plan: ActivationPlan | None = None,
    logit_copies: int = 3,
    teacher: Mapping[str, Any] | None = None,
    teacher_bytes: int = 4,
    teacher_sharded: bool = False,
) -> dict[str, int]:
    """Bytes of every term of a training step's peak under AdamW on one rank; their sum is the peak.

    Weights, gradients and moments are those of the engine that is planned for (`planned_strategy`).

    Args:
        trainable: parameters with gradients; `master_bytes` per element of weights, gradients and moments.
        micro_batch_tokens: tokens of one forward pass; `chunk_tokens`: of these, tokens whose logits exist at a time.
        precision: `fp32`, or `bf16` autocast, which keeps most activations in 2 bytes.
        plan: what layers keep; default: everything, not compiled.
        logit_copies: fp32 `[chunk, V]` tensors alive at once in the loss.
        teacher: architecture of a frozen second model held beside it, with `teacher_bytes` per element;
            `teacher_sharded`: shared out among the ranks.
    """
    head = arch["vocab_size"] * arch["hidden_size"]
    chunk = min(chunk_tokens, micro_batch_tokens, max(1, LOGITS_BYTES // (2 * 4 * arch["vocab_size"])))
    terms = {
        "weights": master_bytes * parameter_count(arch),
        "gradients": master_bytes * trainable,
        "optimizer": ADAM_MOMENTS * master_bytes * trainable,
        "activations": activation_bytes(arch, micro_batch_tokens, precision, plan or ActivationPlan()),
        "logits": 4 * (logit_copies * chunk * arch["vocab_size"] + 2 * head),
    }
    if planned_strategy() in SHARDED:
        terms |= sharded_memory(arch, trainable, planned_strategy(), planned_ranks())
    if teacher is not None:
        shards = teacher_sharded and planned_ranks() > 1
        whole = teacher_bytes * parameter_count(teacher)
        held = sharded_teacher(teacher, teacher_bytes, planned_ranks()) if shards else whole
        terms["teacher"] = held + micro_batch_tokens * _forward_bytes(teacher, 4)
    return terms


def inference_memory(arch: Mapping[str, Any], tokens: int, batch: int, element_size: int) -> dict[str, int]:
    """Bytes of every term of a forward pass over `batch` sequences of `tokens` tokens with a full cache and logits."""
    return {
        "weights": element_size * parameter_count(arch),
        "cache": batch * cache_bytes(arch, tokens, element_size),
        "activations": batch * tokens * _forward_bytes(arch, element_size),
        "logits": 4 * batch * tokens * arch["vocab_size"],
    }


def activation_plan(
    arch: Mapping[str, Any], tokens: int, precision: str, *, compiled: bool, everything: bool, budget: int | None
) -> ActivationPlan:
    """The cheapest way to keep the activations of `tokens` tokens within `budget` bytes; None: whatever they take.

    Compiled layers first give up what pointwise operations can make again, which costs about a hundredth of a step;
    then feed-forward parts are recomputed, half of what a layer keeps for two of its products; then whole layers; each
    from the first layer on, one by one. If the budget is below what that reaches, or `everything` is asked for, all
    layers are.
    """
    full: Kept = "compiled" if compiled else "eager"
    least: Kept = "lean" if compiled else "eager"
    layers = arch["num_hidden_layers"]
    if everything:
        return ActivationPlan(least, layers)
    plans = [ActivationPlan(full)]
    plans += [ActivationPlan(least, 0, count) for count in range(layers + 1)]
    plans += [ActivationPlan(least, count, layers) for count in range(1, layers + 1)]
    fitting = (plan for plan in plans if budget is None or activation_bytes(arch, tokens, precision, plan) <= budget)
    return next(fitting, plans[-1])


def budget_notes(arch: Mapping[str, Any], tokens: int, config: TrainingConfig, plan: ActivationPlan) -> tuple[str, ...]:
    """What the plan should say about an `activation_budget_gib` that has no effect or cannot be met."""
    budget = config.activation_budget
    if budget is None:
        return ()
    if config.gradient_checkpointing:
        return ("activation_budget_gib has no effect beside gradient_checkpointing=true",)
    kept = activation_bytes(arch, tokens, config.precision, plan)
    if kept <= budget:
        return ()
    return (
        f"activation_budget_gib={config.activation_budget_gib:g} cannot be met: with every layer recomputed "
        f"{kept / 2**30:.1f} GiB stay; lower micro_batch_size",
    )


def activation_bytes(arch: Mapping[str, Any], tokens: int, precision: str, plan: ActivationPlan) -> int:
    """Bytes that a forward pass over `tokens` tokens leaves for the backward pass, bf16 copies of weights included."""
    copies = 0
    if precision == "bf16" and plan.kept != "lean":
        heads = 1 if arch["tie_word_embeddings"] else 2
        in_layers = parameter_count(arch) - heads * arch["vocab_size"] * arch["hidden_size"]
        share = (arch["num_hidden_layers"] - plan.recomputed) / arch["num_hidden_layers"]
        # A product keeps the copy of its weight for the backward pass, as long as it is not computed again there.
        copies = int(2 * in_layers * share)
    return copies + tokens * activation_bytes_per_token(arch, precision, plan)


def activation_bytes_per_token(arch: Mapping[str, Any], precision: str, plan: ActivationPlan) -> int:
    """Bytes a token leaves for the backward pass, all layers, with an attention that keeps no `[T, T]` matrix."""
    thin = {**arch, "intermediate_size": 0}
    layers = [
        _layer_bytes(thin if layer < plan.recomputed_mlps else arch, layer, precision, plan.kept)
        for layer in range(arch["num_hidden_layers"])
    ]
    widest = widest_layer_bytes_per_token(arch, precision, plan.kept)
    ends = 4 * 4 * arch["hidden_size"]  # final norm, hidden states, their gradient
    held = 4 * arch["hidden_size"] * plan.recomputed + sum(layers[plan.recomputed :])
    # While a layer is recomputed, the kept layers behind it are free already.
    return ends + max(held, 4 * arch["hidden_size"] * plan.recomputed + widest)


def widest_layer_bytes_per_token(arch: Mapping[str, Any], precision: str, kept: Kept = "eager") -> int:
    """Bytes a token leaves for the backward pass in the layer that keeps most."""
    return max(_layer_bytes(arch, layer, precision, kept) for layer in range(arch["num_hidden_layers"]))


def _layer_bytes(arch: Mapping[str, Any], layer: int, precision: str, kept: Kept) -> int:
    """Counted from what autograd, or torch's partitioner for compiled layers, saves of transformers' Llama.

    Not compiled, fp32: 6 D (norms and the inputs of the products), 2 H d_h, 2 G d_h, 4 I elements; under bf16 autocast
    the products' inputs take 2 bytes. Compiled: the layer's fp32 input, queries, keys, values, attention's output and
    logarithms, and of the products' inputs and outputs 3 D + 3 I elements; lean: D + 2 I.
    """
    width, inner = arch["hidden_size"], arch["intermediate_size"]
    size = 2 if precision == "bf16" else 4
    if mixers(arch)[layer] == "mamba2":
        norms_and_mlp = 26 * width + 8 * inner if precision == "bf16" else 4 * (6 * width + 4 * inner)
        return norms_and_mlp + _mamba_bytes(arch, precision)
    query, key_value = _attention_widths(arch, layer)
    if kept != "eager":
        products = width + 2 * inner if kept == "lean" else 3 * (width + inner)
        return 4 * width + size * (products + 2 * query + key_value) + 4 * arch["num_attention_heads"] + 8
    if precision == "bf16":
        return 26 * width + 2 * (2 * query + key_value + 4 * inner)
    return 4 * (6 * width + 2 * query + key_value + 4 * inner)


def _mamba_bytes(arch: Mapping[str, Any], precision: str) -> int:
    """Bytes a token leaves in a Mamba-2 mixer, fitted to what autograd saves of the chunked scan (to 2 % there).

    Per element of all heads, of the shared x and B, of the decays [chunk, chunk] of a head, and of a chunk's states.
    Compiling does not change it: the scan is as it is.
    """
    heads, head = arch["num_attention_heads"], arch["head_dim"]
    counts = (heads * head, 2 * arch["num_key_value_heads"] * head, heads * SCAN_CHUNK, heads * head**2 / SCAN_CHUNK)
    shares = (13.9, 1.1, 4.4, 0.4) if precision == "bf16" else (16.1, 2.7, 4.9, 0.8)
    return int(4 * sum(count * share for count, share in zip(counts, shares, strict=True)))


def _attention_widths(arch: Mapping[str, Any], layer: int) -> tuple[int, int]:
    """Widths of all query heads, and of all keys and values as attention sees them; of z, C and of x, B in Mamba-2."""
    heads = arch["num_attention_heads"]
    if mixers(arch)[layer] == "mamba2":
        return 2 * heads * arch["head_dim"], 2 * arch["num_key_value_heads"] * arch["head_dim"]
    if mixers(arch)[layer] == "latent_attention":
        key = arch["qk_nope_head_dim"] + arch["qk_rope_head_dim"]
        latent = per_layer(arch["kv_lora_rank"], layer) + arch["qk_rope_head_dim"]
        return heads * key, heads * (key + arch["v_head_dim"]) + latent
    return heads * arch["head_dim"], 2 * arch["num_key_value_heads"] * arch["head_dim"]


def _forward_bytes(arch: Mapping[str, Any], element_size: int) -> int:
    """Bytes a token needs within the widest layer of a forward pass that keeps nothing for a backward pass."""
    widest = max(sum(_attention_widths(arch, layer)) for layer in range(arch["num_hidden_layers"]))
    return element_size * (4 * arch["hidden_size"] + max(widest, 3 * arch["intermediate_size"]))
