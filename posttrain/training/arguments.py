"""The one place that makes transformers' `TrainingArguments`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from posttrain.pipeline.context import StageContext

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Optimisation:
    """Optimiser settings that every training stage has, under the names of the stage configs."""

    lr: float
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    @classmethod
    def of(cls, config: Any) -> Optimisation:
        """Take the fields from a stage's config."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})


def training_arguments(
    ctx: StageContext, optimisation: Optimisation, max_steps: int, micro_batch: int, accumulation: int, **changes: Any
) -> TrainingArguments:
    """Arguments for `StageTrainer`: what is saved, logged and reported is the stage's business, not transformers'.

    Mixed precision is not set here: `StageTrainer` does its own autocast, because a loss that calls the base model
    bypasses the wrapper that accelerate puts around `forward`.

    Args:
        micro_batch: sequences of one forward pass; `accumulation`: forward passes of one optimiser step.
        changes: further `TrainingArguments` fields.
    """
    cpu = ctx.device == "cpu"
    arguments = TrainingArguments(
        output_dir=str(ctx.checkpoint_dir),
        seed=ctx.seed,
        use_cpu=cpu,
        max_steps=max_steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        learning_rate=optimisation.lr,
        lr_scheduler_type=SCHEDULERS[optimisation.lr_scheduler],
        warmup_steps=math.ceil(optimisation.warmup_ratio * max_steps),
        weight_decay=optimisation.weight_decay,
        adam_beta1=optimisation.adam_beta1,
        adam_beta2=optimisation.adam_beta2,
        adam_epsilon=optimisation.adam_epsilon,
        max_grad_norm=optimisation.max_grad_norm,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        # A NaN must be seen, not replaced by the average of the steps before.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=_report_to(ctx),
        run_name=ctx.name,
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
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
