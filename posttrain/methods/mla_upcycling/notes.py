"""Sentences of the plan: what the conversion will be like and what to look out for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.presets import account
from posttrain.methods.mla_upcycling.shape import MlaShape
from posttrain.pipeline.plan_text import size


def plan_notes(
    cfg: MlaUpcycleConfig,
    shape: MlaShape,
    architecture: Mapping[str, Any],
    parameters: tuple[int, int],
    has_calibration: bool,
    ranks: list[int] | None = None,
) -> list[str]:
    """Notes for `Estimate`; `parameters` of source and converted model, `ranks` those of a replayed plan."""
    notes = [_size(cfg, shape, ranks), f"parameters {parameters[1] / parameters[0]:.3f}x the source"]
    if cfg.preset is not None:
        notes.insert(0, account(cfg.preset, cfg.model_dump()))
    if cfg.replays:
        source = cfg.plan if cfg.plan is not None else "inputs.conversion"
        notes.insert(0, f"the plan of {source} is carried out again: nothing is calibrated or decided here")
    elif cfg.energy is not None:
        notes.append("ranks follow from the spectra (energy): shown is the largest possible rank, an upper bound")
    elif cfg.allocation == "water_fill":
        notes.append("ranks differ between layers (water_fill): shown is the uniform rank of the same budget")
    if shape.kv_lora_rank > shape.hidden_size:
        notes.append(f"rank {shape.kv_lora_rank} is wider than the hidden state, {shape.hidden_size}: some is unused")
    if shape.q_lora_rank is not None:
        notes.append(f"queries of rank {shape.q_lora_rank} save parameters; the cache is as large without")
    notes += _rotary(cfg, shape, architecture)
    return notes + _calibration(cfg, shape, has_calibration)


def layer_notes(cfg: MlaUpcycleConfig, calibrated: bool, meanwhile: int) -> list[str]:
    """What a conversion by layer costs instead of memory; `meanwhile` bytes of files that go when it is done."""
    passes = calibrated + cfg.planning_passes + 1
    why = "offload=layers" if cfg.offload == "layers" else "it would not fit into memory whole"
    files = f", {size(meanwhile)} of statistics in files meanwhile" if meanwhile else ""
    return [f"converted by layer ({why}): the source is read {passes} times{files}"]


def _size(cfg: MlaUpcycleConfig, shape: MlaShape, ranks: list[int] | None) -> str:
    asked = f" (asked: {cfg.kv_ratio:g})" if cfg.kv_ratio is not None else ""
    rope, ranks = shape.qk_rope_head_dim, ranks or [shape.kv_lora_rank]
    ratio = (sum(ranks) / len(ranks) + rope) / shape.source_elements
    rank = f"{ranks[0]}" if len(set(ranks)) == 1 else f"{min(ranks)}..{max(ranks)}"
    factor = f"{1 / ratio:.2f}x smaller than the source" if ratio < 1 else "no smaller than the source"
    return (
        f"KV cache {rank} + {rope} of {shape.source_elements} elements per token and layer: ratio {ratio:.4f}{asked}, "
        f"{factor}"
    )


def _rotary(cfg: MlaUpcycleConfig, shape: MlaShape, architecture: Mapping[str, Any]) -> list[str]:
    notes = []
    full = shape.kv_lora_rank == shape.kv_heads * shape.head_dim
    if cfg.rotary_plan == "lossless" and full and cfg.energy is None:
        notes.append("lossless: every key stays rotary and the latent holds all values, the logits are the source's")
    if (own := shape.latent_rope_parameters) is not None:
        notes.append(
            f"rotary keys turn by YaRN, factor {own['factor']:g} over {own['original_max_position_embeddings']} "
            f"positions, instead of the source's {architecture['rope_parameters']['rope_type']} scaling"
        )
    elif cfg.rotary_scaling == "yarn":
        notes.append("rotary_scaling=yarn replaces nothing: the source's rotary embedding is not scaled")
    if cfg.preset == "x_ecomla_released" and cfg.energy is not None and cfg.end_layer_rank is None:
        notes.append("the released code also pins the first and last layer to a rank of its config: end_layer_rank")
    return notes


def _calibration(cfg: MlaUpcycleConfig, shape: MlaShape, has_calibration: bool) -> list[str]:
    if cfg.replays:
        return ["the calibration input is not used: the plan is made"] if has_calibration else []
    notes = []
    if has_calibration and cfg.objective_for(True) == "weight":
        notes.append("the calibration input is not used: the plan follows from the weights")
    if not has_calibration and cfg.rotary_plan not in ("xeco", "lossless"):
        notes.append("no calibration input: the plan follows from the weights, which is worse on real text")
    if shape.qk_norm and cfg.objective_for(has_calibration) == "weight":
        notes.append("QK-norm without calibration: the plan takes each head's norm as the constant it is on average")
    return notes
