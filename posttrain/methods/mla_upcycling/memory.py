"""Peak memory of a conversion by term, from shapes alone: in memory, or by layer with `offload`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.shape import MlaShape
from posttrain.models.architecture import parameter_count
from posttrain.pipeline.device import planned_memory, plans_for_gpu
from posttrain.pipeline.plan import RUNTIME_BYTES

SEQUENCES_PER_BATCH = 4
HIDDEN_STATES = "hidden_states"
"""The term that only a conversion by layer has."""


def memory_terms(
    source: Mapping[str, Any], target: Mapping[str, Any], shape: MlaShape, cfg: MlaUpcycleConfig, calibrated: bool
) -> dict[str, int]:
    """Bytes by term; `offload=auto` is by layer where that is needed to fit, and would be less."""
    whole = _in_memory(source, target, shape, cfg, calibrated)
    if cfg.offload == "never":
        return whole
    by_layer = _by_layer(source, target, shape, cfg, calibrated)
    if cfg.offload == "layers":
        return by_layer
    capacity = planned_memory()
    beside = 0 if plans_for_gpu() else RUNTIME_BYTES  # a plan adds it to what stages estimate
    fits = capacity is None or sum(whole.values()) + beside <= capacity
    return whole if fits or sum(by_layer.values()) >= sum(whole.values()) else by_layer


def _in_memory(
    source: Mapping[str, Any], target: Mapping[str, Any], shape: MlaShape, cfg: MlaUpcycleConfig, calibrated: bool
) -> dict[str, int]:
    memory = {"source_weights": 4 * parameter_count(source), "converted_weights": 4 * parameter_count(target)}
    if not cfg.replays:
        memory["decomposition"] = _decomposition_bytes(shape)
    memory["plan"] = plan_bytes(shape)
    if calibrated:
        memory["statistics"] = shape.layers * _statistics_bytes(shape)
        memory["activations"] = _forward_bytes(source, cfg)
    return memory


def _by_layer(
    source: Mapping[str, Any], target: Mapping[str, Any], shape: MlaShape, cfg: MlaUpcycleConfig, calibrated: bool
) -> dict[str, int]:
    one = {"num_hidden_layers": 1, "mixers": ["latent_attention"], "kv_lora_rank": shape.kv_lora_rank}
    around = 4 * source["vocab_size"] * source["hidden_size"] * (1 if source["tie_word_embeddings"] else 2)
    layers = (4 * parameter_count({**source, "num_hidden_layers": 1}), 4 * parameter_count({**target, **one}))
    largest = max(count - around for count in layers)
    # A layer and what it becomes, in float32 and once more as written; or the embeddings and their copies.
    memory = {"source_weights": max(2 * largest, 2 * around), "converted_weights": 2 * largest}
    if not cfg.replays:
        memory["decomposition"] = _decomposition_bytes(shape)
    memory["plan"] = plan_bytes(shape)
    memory[HIDDEN_STATES] = 0
    if calibrated:
        memory["statistics"] = 2 * _statistics_bytes(shape)
        memory["activations"] = _forward_bytes(source, cfg)
        memory[HIDDEN_STATES] = 2 * 4 * cfg.calibration_tokens * source["hidden_size"]
    return memory


def plan_bytes(shape: MlaShape) -> int:
    """The matrices of all layers' plans, float32."""
    expansion = shape.kv_heads * (shape.qk_nope_head_dim + shape.v_head_dim)
    rotary = shape.qk_rope_head_dim * shape.source_elements
    query = 2 * (shape.q_lora_rank or 0) * shape.heads * shape.head_dim
    return 4 * shape.layers * (shape.kv_lora_rank * (shape.source_elements + expansion) + rotary + query)


def stored_statistics_bytes(shape: MlaShape) -> int:
    """Files of a conversion by layer while it lasts: the moments of every layer."""
    return shape.layers * _statistics_bytes(shape)


def _decomposition_bytes(shape: MlaShape) -> int:
    """About ten float64 matrices of the un-repeated key/value width, and the layer's weights in float64."""
    width, queries = shape.source_elements, shape.heads * shape.head_dim
    narrow = 0 if shape.q_lora_rank is None else 6 * queries * queries
    return 8 * (10 * width * width + narrow + (width + 2 * queries) * shape.hidden_size)


def _statistics_bytes(shape: MlaShape) -> int:
    """float64 moments of one layer: of its input, with QK-norm also of normalised keys and queries."""
    keys = shape.kv_heads * shape.head_dim if shape.qk_norm else 0
    width = shape.hidden_size + keys
    return 8 * (width * (width + 1) + keys * shape.head_dim)


def _forward_bytes(architecture: Mapping[str, Any], cfg: MlaUpcycleConfig) -> int:
    """One block's float32 activations at its widest; no logits are computed."""
    tokens = SEQUENCES_PER_BATCH * cfg.calibration_sequence_length
    return 4 * tokens * (6 * architecture["hidden_size"] + 3 * architecture["intermediate_size"])
