"""The training part of the stage: from tokenised pairs to the trained model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.methods.preference.config import PreferenceConfig
from posttrain.methods.preference.data import Pairs, read_pairs
from posttrain.methods.preference.trainer import PreferenceTrainer
from posttrain.models.loading import load_model, save_model
from posttrain.pipeline.context import StageContext
from posttrain.training.logprob import plain_head
from posttrain.training.rehearsal import rehearse_save
from posttrain.training.results import disk_needed, last_tenth, peak_memory, reset_peak_memory


def read_training_pairs(ctx: StageContext, tokenizer: PreTrainedTokenizerBase) -> Pairs:
    """The pairs of input `data`. Raises StageError if there is none."""
    return read_pairs(ctx.inputs["data"].path, tokenizer, ctx.config.sequence_length)


def train(ctx: StageContext, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, folder: Path) -> list[dict[str, float]]:
    """Train the input model and save it to `folder`; the history of all steps.

    Raises:
        StopRequested: a stop was asked for; the state is saved.
        StageError: a head that TRL would compute otherwise, no space, a loss that is not a number.
    """
    cfg: PreferenceConfig = ctx.config
    source = ctx.inputs["model"].path
    model = load_model(source, device=ctx.device, dtype=torch.float32)
    plain_head(model)
    alone = cfg.lora is None and not cfg.precompute_reference
    reference = load_model(source, device=ctx.device, dtype=torch.float32) if alone else None
    reset_peak_memory(ctx.device)
    trainer = PreferenceTrainer(ctx, cfg, model, reference, tokenizer, pairs.rows)
    trainer.watch.tokens_per_step = round(pairs.tokens / len(pairs.rows) * cfg.pairs_per_step)
    save_dtype = getattr(torch, cfg.save_dtype)
    needed = disk_needed(trainer.model, cfg.keep_checkpoints, cfg.save_dtype)
    ctx.first_does(lambda: rehearse_save(ctx.work_dir, trainer.model, model.config, save_dtype, needed))
    history = trainer.fit()

    def write() -> None:
        save_model(trainer.trained().eval(), tokenizer, folder, dtype=save_dtype, tokenizer_from=source)

    ctx.first_does(write)
    _record(ctx, trainer, history, pairs)
    return history


def _record(ctx: StageContext, trainer: PreferenceTrainer, history: list[dict[str, Any]], pairs: Pairs) -> None:
    cfg: PreferenceConfig = ctx.config
    used = len(history) * cfg.pairs_per_step
    ctx.record_result(
        steps=len(history),
        tokens=round(used * pairs.tokens / len(pairs.rows)),
        epochs=used / len(pairs.rows),
        pairs=len(pairs.rows),
        truncated=pairs.truncated,
        left_out=sum(pairs.unusable.values()),
        final_loss=history[-1]["loss"],
        last_tenth_loss=last_tenth(history, "loss"),
        last_tenth_reward_accuracy=last_tenth(history, "rewards/accuracies"),
        last_tenth_reward_margin=last_tenth(history, "rewards/margins"),
    )
    plan = trainer.activation_plan()
    ctx.record_timing(
        tokens_per_second=trainer.watch.tokens_per_second,
        peak_memory_bytes=peak_memory(ctx.device),
        micro_batch=cfg.micro_batch(ctx.world_size),
        compiled=trainer.compiles,
        recomputed_layers=plan.recomputed,
        recomputed_mlps=plan.recomputed_mlps,
    )
