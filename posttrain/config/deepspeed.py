"""The configuration that DeepSpeed gets: a function of the recipe, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEVER = 10**9

BUCKET = 50_000_000
"""Elements that are summed over ranks, or gathered, at a time."""

OURS: dict[str, str] = {
    "fp16": "weights are fp32, and `precision` of the stage says what is computed in bf16",
    "bf16": "weights are fp32, and `precision` of the stage says what is computed in bf16",
    "amp": "weights are fp32, and `precision` of the stage says what is computed in bf16",
    "torch_autocast": "weights are fp32, and `precision` of the stage says what is computed in bf16",
    "data_types": "gradients are summed in fp32",
    "communication_data_type": "gradients are summed in fp32",
    "optimizer": "AdamW is that of the stage (lr, adam_beta1, weight_decay, …)",
    "scheduler": "the rate is that of the stage (lr_scheduler, warmup_ratio)",
    "train_batch_size": "the batch is that of the stage",
    "train_micro_batch_size_per_gpu": "it is the stage's micro_batch_size",
    "gradient_accumulation_steps": "it follows from the stage's batch, micro_batch_size and engine.ranks",
    "gradient_clipping": "it is the stage's max_grad_norm",
    "gradient_allreduce_op": "gradients are summed over ranks",
    "prescale_gradients": "gradients are summed over ranks",
    "gradient_predivide_factor": "gradients are summed over ranks",
    "zero_allow_untested_optimizer": "AdamW is torch's",
    "zero_force_ds_cpu_optimizer": "AdamW is torch's",
    "checkpoint": "checkpoints are posttrain's own",
    "zero_optimization.stage": "it is the engine's: engine=zero2 or engine=zero3",
    "zero_optimization.zero_quantized_weights": "weights are not rounded",
    "zero_optimization.zero_quantized_gradients": "gradients are not rounded",
    "zero_optimization.zero_quantized_nontrainable_weights": "weights are not rounded",
    "zero_optimization.zero_hpz_partition_size": "checkpoints know shards over all ranks only",
    "zero_optimization.mics_shard_size": "checkpoints know shards over all ranks only",
    "zero_optimization.zenflow": "it changes the order of updates",
}
"""Keys that a recipe may not set, and why."""


def deepspeed_config(
    stage: int,
    world_size: int,
    *,
    micro_batch: int,
    accumulation: int,
    max_grad_norm: float,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration of a training on `world_size` ranks, with the recipe's `engine.deepspeed` merged over.

    Args:
        stage: 2 or 3.
        micro_batch: sequences of a rank's forward pass; accumulation: forward passes of an optimiser step.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
    }
    if stage == 2:
        zero |= {"allgather_bucket_size": BUCKET}
    else:
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 10_000}
    config: dict[str, Any] = {
        "train_batch_size": world_size * micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "zero_optimization": zero,
    }
    if stage == 2:
        config["gradient_allreduce_op"] = "sum"
    return merged(config, overrides or {})


def forbidden(overrides: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A sentence for each key of a recipe's `engine.deepspeed` that would break what posttrain promises."""
    found = []
    for key, value in overrides.items():
        name = f"{prefix}{key}"
        if name in OURS:
            found.append(f"engine.deepspeed.{name} cannot be set: {OURS[name]}")
        elif isinstance(value, Mapping):
            found += forbidden(value, f"{name}.")
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
