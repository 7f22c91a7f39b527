"""The one place that makes transformers' `TrainingArguments`."""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import TrainingArguments

from posttrain.pipeline.context import StageContext
from posttrain.training.config import TrainingConfig

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(
    ctx: StageContext,
    config: TrainingConfig,
    micro_batch: int,
    accumulation: int,
    *,
    workers: int = 0,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    **changes: Any,
) -> TrainingArguments:
    """Arguments for `StageTrainer`: what is saved, logged and reported is the stage's business, not transformers'.

    Mixed precision is not set here: `StageTrainer` does its own autocast, because a loss that calls the base model
    bypasses the wrapper that accelerate puts around `forward`.

    Args:
        micro_batch: sequences of one forward pass; `accumulation`: forward passes of one optimiser step.
        workers: processes that make batches. Token blocks in memory need none: a batch is a copy of a few rows, and
            accelerate's loader already fetches one ahead. A dataset that tokenizes or packs on the way does.
        arguments_class: `TrainingArguments` or a subclass, such as TRL's `SFTConfig`.
        changes: further fields of it.
    """
    cpu = ctx.device == "cpu"
    arguments = arguments_class(
        output_dir=str(ctx.checkpoint_dir),
        seed=ctx.seed,
        use_cpu=cpu,
        max_steps=config.max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        # Fused on a CPU too: 0.08 s instead of 0.52 s a step for 135M parameters on one thread. `StageTrainer` relies
        # on its `found_inf`, which leaves the weights alone without asking the device.
        optim="adamw_torch_fused",
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULERS[config.lr_scheduler],
        warmup_steps=math.ceil(config.warmup_ratio * config.max_steps),
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        # A NaN must be seen, not replaced by the average of the steps before; and the filter asks the device.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        # A loss is already this rank's share of the step's: see `StageTrainer`.
        average_tokens_across_devices=False,
        report_to=_report_to(ctx),
        run_name=ctx.name,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=not cpu,
        # From pinned memory the copy of the next batch runs beside the step that is being computed.
        accelerator_config={"non_blocking": not cpu},
        **changes,
    )
    if ctx.world_size == 1:
        # Several visible GPUs would make transformers wrap the model in DataParallel: a rank has one device.
        _ = arguments.device
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _report_to(ctx: StageContext) -> list[str]:
    """Trackers of the run besides our own events and metrics; wandb is told by its environment, which a user's wins."""
    tracker = ctx.tracker or {}
    if tracker.get("name", "none") == "none":
        return []
    os.environ.setdefault("WANDB_DIR", str(tracker.get("dir") or ctx.work_dir))
    for name in ("project", "mode"):
        if value := tracker.get(name):
            os.environ.setdefault(f"WANDB_{name.upper()}", str(value))
    return [tracker["name"]]
