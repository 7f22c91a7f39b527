"""What a policy-gradient stage does: read prompts, train, save the model, its history and some completions."""

from __future__ import annotations

import shutil
import time
from typing import Any

import torch

from posttrain.models.loading import load_model, load_tokenizer, save_model
from posttrain.pipeline.context import StageContext
from posttrain.policy.completions import FILE
from posttrain.policy.config import PolicyConfig
from posttrain.policy.data import Prompts, read_prompts
from posttrain.policy.trainer import PolicyTrainer
from posttrain.rewards.score import RewardSet
from posttrain.training.logprob import plain_head
from posttrain.training.rehearsal import rehearse_save
from posttrain.training.results import disk_needed, last_tenth, peak_memory, reset_peak_memory, write_history


def train(ctx: StageContext, trainer_class: type[PolicyTrainer]) -> None:
    """Train the input model and write the outputs `model` and `history`.

    Raises:
        StopRequested: a stop was asked for; the state is saved.
        StageError: no usable prompt, a head that TRL would compute otherwise, no space, a loss that is not a number.
    """
    cfg: PolicyConfig = ctx.config
    began = time.monotonic()
    source = ctx.inputs["model"].path
    tokenizer = load_tokenizer(source)
    prompts = read_prompts(ctx.inputs["data"].path, tokenizer, cfg.max_prompt_length, cfg.rewards)
    model = load_model(source, device=ctx.device, dtype=torch.float32)
    plain_head(model)
    reset_peak_memory(ctx.device)
    where = f"stages.{ctx.name}.rewards"
    with RewardSet(cfg.rewards, cfg.answer, workers=cfg.reward_workers, where=where) as rewards:
        rewards.warm()
        trainer = trainer_class(ctx, cfg, model, tokenizer, prompts, rewards)
        save_dtype = getattr(torch, cfg.save_dtype)
        needed = disk_needed(trainer.model, cfg.keep_checkpoints, cfg.save_dtype)
        ctx.first_does(lambda: rehearse_save(ctx.work_dir, trainer.model, model.config, save_dtype, needed))
        history = trainer.fit()

    def write() -> None:
        shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True)  # an interrupted attempt may have left parts
        folder = ctx.output_dir("history")
        save_model(
            trainer.trained().eval(), tokenizer, ctx.output_dir("model"), dtype=save_dtype, tokenizer_from=source
        )
        write_history(folder, history)
        if trainer.completion_log.path.is_file():
            shutil.copyfile(trainer.completion_log.path, folder / FILE)

    ctx.first_does(write)
    _record(ctx, trainer, history, prompts, time.monotonic() - began)


def _record(
    ctx: StageContext, trainer: PolicyTrainer, history: list[dict[str, Any]], prompts: Prompts, seconds: float
) -> None:
    cfg: PolicyConfig = ctx.config
    written = [row for row in history if "reward" in row]
    tenth = {
        name: last_tenth(rows, name)
        for name in ("reward", "entropy", "completions/mean_length")
        if (rows := [row for row in written if row.get(name) is not None])
    }
    ctx.record_result(
        steps=len(history),
        rollouts=cfg.rollouts,
        completions=cfg.rollouts * cfg.generation_batch_size,
        questions=len(prompts.rows),
        epochs=cfg.rollouts * cfg.questions_per_batch / len(prompts.rows),
        left_out=sum(prompts.unusable.values()),
        first_reward=written[0]["reward"],
        last_tenth_reward=tenth.get("reward"),
        first_entropy=written[0].get("entropy"),
        last_tenth_entropy=tenth.get("entropy"),
        last_tenth_length=tenth.get("completions/mean_length"),
        alarms=trainer.rails.alarms,
    )
    ctx.record_timing(
        seconds=seconds,
        completions_per_second=trainer.watch.steps
        * cfg.sequences_per_step
        / cfg.num_iterations
        / max(trainer.watch.seconds, 1e-9),
        peak_memory_bytes=peak_memory(ctx.device),
        micro_batch=cfg.micro_batch(ctx.world_size),
        compiled=trainer.compiles,
        rollout="engine" if trainer.rollout is not None else cfg.rollout.replace("auto", "transformers"),
        parts=_parts(trainer),
    )


def _parts(trainer: PolicyTrainer) -> dict[str, float]:
    """Seconds of this attempt, apart: writing, scoring, what else makes a batch of it, and the optimiser steps."""
    found = trainer.clock.seconds
    rollout, scoring, batches = (found.get(name, 0.0) for name in ("rollout", "scoring", "batches"))
    return {
        "rollout": rollout,
        "scoring": scoring,
        "batching": batches - rollout - scoring,
        "updates": trainer.watch.seconds - batches,
    }
