"""The `sft` stage: model + rows -> fine-tuned model and its history."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import Problem, RecipeError
from posttrain.methods.sft.config import SftConfig
from posttrain.models.architecture import cache_bytes_per_token, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import plans_for_gpu
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec
from posttrain.training.adapters import adapter_parameters, target_problems
from posttrain.training.estimate import (
    ELEMENT_SIZE,
    activation_plan,
    budget_notes,
    trainable_parameters,
    training_memory,
)
from posttrain.training.input_checks import too_long
from posttrain.training.stage import TrainingStage
from posttrain.training.trl_memory import head_bytes

if TYPE_CHECKING:
    from posttrain.methods.sft.data import Sequences
    from posttrain.methods.sft.trainer import SftTrainer

NEEDED_ROWS = {"assistant": ("messages", "prompt"), "completion": ("messages", "prompt")}
"""Kinds of rows, as far as a dataset says it, that have what `loss_on` learns."""


class Sft(TrainingStage):
    """Train a model on conversations, on prompts with completions, or on plain text."""

    type: ClassVar[str] = "sft"
    version: ClassVar[str] = "2"
    Config = SftConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="The model to train."),
        "data": InputSpec("dataset", doc="Rows of `messages`, of `prompt` and `completion`, or of `text`."),
    }

    def check(self, cfg: SftConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        model, data = inputs["model"], inputs["data"]
        problems = [
            *_data_problems(cfg, data),
            *_template_problems(cfg, model, data),
            *_model_problems(cfg, model.architecture),
        ]
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: SftConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        arch, data = inputs["model"].architecture, inputs["data"]
        tokens = cfg.max_steps * cfg.tokens_per_step
        if arch is None:
            return Estimate(tokens=tokens, data_tokens=data.tokens)
        adapters = adapter_parameters(arch, cfg.lora) if cfg.lora else 0
        trainable = adapters or trainable_parameters(arch, cfg.trainable)
        micro_batch_tokens = cfg.micro_batch() * cfg.sequence_length
        plan = activation_plan(
            arch,
            micro_batch_tokens,
            cfg.precision,
            compiled=cfg.compiles(on_gpu=plans_for_gpu()),
            everything=cfg.gradient_checkpointing,
            budget=cfg.activation_budget,
        )
        memory = training_memory(arch, trainable, micro_batch_tokens, 1, precision=cfg.precision, plan=plan)
        return Estimate(
            parameters=parameter_count(arch),
            notes=budget_notes(arch, micro_batch_tokens, cfg, plan),
            trainable=trainable,
            tokens=tokens,
            data_tokens=data.tokens,
            memory={
                **memory,
                "weights": memory["weights"] + 4 * adapters,
                "logits": head_bytes(arch, micro_batch_tokens),
            },
            cache_bytes_per_token=cache_bytes_per_token(arch),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * parameter_count(arch),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        import torch

        from posttrain.methods.sft.data import read_sequences
        from posttrain.methods.sft.trainer import SftTrainer
        from posttrain.models.loading import load_model, load_tokenizer, save_model
        from posttrain.training.logprob import plain_head
        from posttrain.training.rehearsal import rehearse_save
        from posttrain.training.results import disk_needed, reset_peak_memory, write_history

        cfg: SftConfig = ctx.config
        began = time.monotonic()
        source = ctx.inputs["model"].path
        tokenizer = load_tokenizer(source)
        sequences = read_sequences(ctx.inputs["data"].path, tokenizer, cfg)
        model = load_model(source, device=ctx.device, dtype=torch.float32)
        plain_head(model)  # a head that TRL's would compute otherwise is refused before training
        reset_peak_memory(ctx.device)
        trainer = SftTrainer(ctx, cfg, model, tokenizer, sequences.rows)
        needed = disk_needed(trainer.model, cfg.keep_checkpoints, cfg.save_dtype)
        save_dtype = getattr(torch, cfg.save_dtype)
        ctx.first_does(lambda: rehearse_save(ctx.work_dir, trainer.model, model.config, save_dtype, needed))
        history = trainer.fit()

        def write() -> None:
            shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True)  # an interrupted attempt may have left parts
            trained, target = trainer.trained().eval(), ctx.output_dir("model")
            save_model(trained, tokenizer, target, dtype=save_dtype, tokenizer_from=source)
            write_history(ctx.output_dir("history"), history)

        ctx.first_does(write)
        _record(ctx, trainer, history, sequences, time.monotonic() - began)
        return {name: ctx.output_dir(name) for name in self.outputs}


def _data_problems(cfg: SftConfig, data: ArtifactMeta) -> list[Problem]:
    where = f"data={cfg.inputs.get('data', '?')}"
    if data.rows == 0:
        return [Problem("the training data has no rows", where=where, fix="give a file with conversations or text")]
    kind, needed = data.extra.get("rows"), NEEDED_ROWS.get(cfg.loss_on)
    if kind == "preference":
        problem = "the training data has preference pairs, sft learns from one answer"
        return [Problem(problem, where=where, fix="a dataset of conversations or text, or a preference stage")]
    if kind == "text" and needed:
        problem = f"the training data is plain text, which has no {cfg.loss_on} to learn"
        return [Problem(problem, where=where, fix="loss_on=all, or a dataset of conversations")]
    return []


def _template_problems(cfg: SftConfig, model: ArtifactMeta, data: ArtifactMeta) -> list[Problem]:
    """Conversations alone, and a model that is known to have no chat template: every row would be left out."""
    known = model.tokenizer is not None  # else the model is not here yet, and neither is its template
    if data.extra.get("rows") != "messages" or not known or model.chat_template is not None:
        return []
    return [
        Problem(
            "the training data has conversations, and the model's tokenizer has no chat template to write them in",
            where=f"data={cfg.inputs.get('data', '?')}",
            fix="add chat_template.jinja to the model's folder, or give rows of `text` (loss_on=all) or of `prompt` "
            "and `completion` as strings (loss_on=completion)",
        )
    ]


def _model_problems(cfg: SftConfig, arch: Mapping[str, Any] | None) -> list[Problem]:
    return [*too_long(cfg, model=arch), *target_problems(cfg.lora, arch)] if arch else []


def _record(
    ctx: StageContext, trainer: SftTrainer, history: list[dict[str, float]], sequences: Sequences, seconds: float
) -> None:
    from posttrain.training.results import last_tenth, peak_memory

    cfg: SftConfig = ctx.config
    ctx.record_result(
        steps=len(history),
        tokens=len(history) * cfg.tokens_per_step,
        epochs=len(history) * cfg.sequences_per_step / len(sequences.rows),
        documents=sequences.documents,
        sequences=len(sequences.rows),
        learnt_tokens=sequences.learnt,
        truncated=sequences.truncated,
        left_out=sum(sequences.unusable.values()),
        final_loss=history[-1]["loss"],
        last_tenth_loss=last_tenth(history, "loss"),
    )
    plan = trainer.activation_plan()
    ctx.record_timing(
        seconds=seconds,
        tokens_per_second=trainer.watch.tokens_per_second,
        peak_memory_bytes=peak_memory(ctx.device),
        micro_batch=cfg.micro_batch(ctx.world_size),
        compiled=trainer.compiles,
        recomputed_layers=plan.recomputed,
        recomputed_mlps=plan.recomputed_mlps,
    )
