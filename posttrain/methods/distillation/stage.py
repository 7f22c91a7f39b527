"""The `distill` stage: student + teacher + text -> trained student and its history."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.config.schema import SHARDED
from posttrain.errors import Problem, RecipeError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.methods.distillation.estimate import cache_bytes, cache_notes, logit_copies, peak_of_both
from posttrain.models.architecture import cache_bytes_per_token, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import planned_ranks, planned_strategy, plans_for_gpu
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec
from posttrain.training.adapters import adapter_parameters, target_problems
from posttrain.training.estimate import (
    ELEMENT_SIZE,
    activation_plan,
    budget_notes,
    trainable_parameters,
    training_memory,
)
from posttrain.training.input_checks import given, no_documents, too_long, unfit_teacher
from posttrain.training.stage import TrainingStage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.methods.distillation.trainer import DistillTrainer


class Distill(TrainingStage):
    """Train the student to the frozen teacher's next-token distribution on text."""

    type: ClassVar[str] = "distill"
    version: ClassVar[str] = "2"
    Config = DistillConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "student": InputSpec("model", doc="The model to train."),
        "teacher": InputSpec("model", doc="A frozen model with the same tokenizer; often the student's source."),
        "data": InputSpec("dataset", doc="Text to train on."),
    }
    trains: ClassVar[str] = "student"

    def check(self, cfg: DistillConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        student, teacher, data = inputs["student"], inputs["teacher"], inputs["data"]
        problems = unfit_teacher(
            cfg,
            student,
            teacher,
            idle="its distribution is already the student's" if cfg.ce_weight == 0 else None,
            apart="their distributions cannot be compared",
            fix="give another teacher of the student's family, often its source: inputs.teacher=model",
        )
        shapes = {"student": student.architecture, "teacher": teacher.architecture}
        sizes = {role: shape["vocab_size"] for role, shape in shapes.items() if shape}
        if len(set(sizes.values())) > 1:
            problems.append(
                Problem(
                    f"the student has {sizes['student']} vocabulary rows, the teacher {sizes['teacher']}",
                    where=given(cfg, "student", "teacher"),
                    fix="choose a teacher of the same vocabulary, or cut padded rows off the larger embedding",
                )
            )
        problems += too_long(cfg, **shapes)
        if cfg.teacher_device.startswith("cuda") and not plans_for_gpu():
            problems.append(
                Problem(
                    f"teacher_device={cfg.teacher_device}, but the run is planned for a machine without a GPU",
                    where="teacher_device",
                    fix="teacher_device=same",
                )
            )
        problems += no_documents(cfg, data)
        problems += target_problems(cfg.lora, student.architecture) if student.architecture else []
        problems += _cache_problems(cfg, teacher.architecture)
        problems += _graph_problems(cfg)
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: DistillConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        student, teacher = inputs["student"].architecture, inputs["teacher"].architecture
        tokens = cfg.max_steps * cfg.tokens_per_step
        if student is None:
            return Estimate(tokens=tokens, data_tokens=inputs["data"].tokens)
        adapters = adapter_parameters(student, cfg.lora) if cfg.lora else 0
        trainable = adapters or trainable_parameters(student, cfg.trainable)
        micro_batch_tokens = cfg.micro_batch() * cfg.sequence_length
        plan = activation_plan(
            student,
            micro_batch_tokens,
            cfg.precision,
            compiled=cfg.compiles(on_gpu=plans_for_gpu()),
            everything=cfg.gradient_checkpointing,
            budget=cfg.activation_budget,
        )
        memory = training_memory(
            student,
            trainable,
            micro_batch_tokens,
            cfg.chunk_tokens,
            precision=cfg.precision,
            plan=plan,
            logit_copies=logit_copies(cfg),
            teacher=None if cfg.teacher_cache else teacher,
            teacher_bytes=ELEMENT_SIZE[cfg.teacher_dtype],
            teacher_sharded=cfg.teacher_sharding == "sharded",
        )
        memory["weights"] += 4 * adapters
        cached = cache_bytes(cfg, inputs["data"].tokens)
        return Estimate(
            parameters=parameter_count(student),
            notes=budget_notes(student, micro_batch_tokens, cfg, plan) + cache_notes(cfg, cached),
            trainable=trainable,
            tokens=tokens,
            data_tokens=inputs["data"].tokens,
            memory=peak_of_both(cfg, memory, student, teacher),
            cache_bytes_per_token=cache_bytes_per_token(student),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * parameter_count(student) + cached,
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        import torch

        from posttrain.methods.distillation.data import read_packs
        from posttrain.methods.distillation.teacher_pass import cached_teacher
        from posttrain.methods.distillation.trainer import DistillTrainer
        from posttrain.models.loading import load_model, load_tokenizer, save_model
        from posttrain.training.blocks import read_blocks
        from posttrain.training.rehearsal import rehearse_save
        from posttrain.training.results import disk_needed, reset_peak_memory, write_history

        cfg: DistillConfig = ctx.config
        began = time.monotonic()
        source, save_dtype = ctx.inputs["student"].path, getattr(torch, cfg.save_dtype)
        tokenizer = load_tokenizer(source)
        read = read_packs if cfg.packing == "documents" else read_blocks
        blocks = read(ctx.inputs["data"].path, tokenizer, cfg.sequence_length)
        student = load_model(source, device=ctx.device, dtype=torch.float32)
        reset_peak_memory(ctx.device)
        load_teacher = partial(_load_teacher, ctx, student)
        cache = None
        if cfg.teacher_cache:
            ctx.first_does(lambda: cached_teacher(ctx, cfg, blocks, load_teacher) and None)
            cache = cached_teacher(ctx, cfg, blocks, load_teacher)
        trainer = DistillTrainer(ctx, cfg, student, None if cache else load_teacher(), blocks, cache)
        needed = disk_needed(trainer.model, cfg.keep_checkpoints, cfg.save_dtype)
        ctx.first_does(lambda: rehearse_save(ctx.work_dir, student, student.config, save_dtype, needed))
        history = trainer.fit()

        def write() -> None:
            shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True)  # an interrupted attempt may have left parts
            trained, target = trainer.trained().eval(), ctx.output_dir("model")
            save_model(trained, tokenizer, target, dtype=save_dtype, tokenizer_from=source)
            write_history(ctx.output_dir("history"), history)

        ctx.first_does(write)
        _record(ctx, trainer, history, blocks, time.monotonic() - began)
        return {name: ctx.output_dir(name) for name in self.outputs}


def _cache_problems(cfg: DistillConfig, teacher: Mapping[str, Any] | None) -> list[Problem]:
    if not (cfg.teacher_cache and teacher and cfg.teacher_cache.top_k > teacher["vocab_size"]):
        return []
    vocabulary = teacher["vocab_size"]
    problem = f"teacher_cache keeps {cfg.teacher_cache.top_k} tokens of a vocabulary of {vocabulary}"
    return [Problem(problem, where="teacher_cache.top_k", fix=f"teacher_cache.top_k={vocabulary}")]


def _graph_problems(cfg: DistillConfig) -> list[Problem]:
    """Why a step that is asked for as a CUDA graph cannot be one, as far as a plan can tell."""
    runs_teacher = cfg.teacher_cache is None
    against = {
        "it needs a GPU": not plans_for_gpu(),
        "it needs the whole model on every rank": planned_strategy() in SHARDED,
        "batches of packing=documents differ in shape": cfg.packing == "documents",
        "the teacher is on another device": runs_teacher and cfg.teacher_device == "cpu",
        "the teacher is in shards": runs_teacher and cfg.teacher_sharding == "sharded" and planned_ranks() > 1,
    }
    if cfg.cuda_graph != "on":
        return []
    found = [reason for reason, holds in against.items() if holds][:1]
    return [Problem(f"no CUDA graph of the training step: {why}", "cuda_graph", "cuda_graph=auto") for why in found]


def _load_teacher(ctx: StageContext, student: PreTrainedModel) -> PreTrainedModel:
    """The teacher in its type and on its device, after a look whether the loss takes the two."""
    import torch

    from posttrain.methods.distillation.models import check_heads, teacher_device
    from posttrain.models.loading import load_model

    cfg: DistillConfig = ctx.config
    place = str(teacher_device(cfg.teacher_device, torch.device(ctx.device)))
    teacher = load_model(ctx.inputs["teacher"].path, device=place, dtype=getattr(torch, cfg.teacher_dtype))
    check_heads(student, teacher)
    return teacher


def _record(
    ctx: StageContext, trainer: DistillTrainer, history: list[dict[str, float]], blocks: Any, seconds: float
) -> None:
    from posttrain.training.results import last_tenth, peak_memory

    cfg: DistillConfig = ctx.config
    tokens, rows = len(history) * cfg.tokens_per_step, len(blocks)
    if cfg.packing == "documents":
        tokens, rows = sum(trainer.sequences.totals(step)[0] for step in range(len(history))), len(blocks.ids)
        ctx.record_result(padding=blocks.waste)
    if trainer.cache is not None:
        ctx.record_result(teacher_top_k_mass=trainer.cache.mass)
        ctx.record_timing(teacher_cache_bytes=trainer.cache.bytes)
    ctx.record_result(
        steps=len(history),
        tokens=tokens,
        epochs=len(history) * cfg.sequences_per_step / rows,
        final_loss=history[-1]["loss"],
        final_kl=history[-1]["kl"],
        last_tenth_kl=last_tenth(history, "kl"),
    )
    ctx.record_timing(
        seconds=seconds,
        tokens_per_second=trainer.watch.tokens_per_second,
        peak_memory_bytes=peak_memory(ctx.device),
        micro_batch=cfg.micro_batch(ctx.world_size),
        compiled=trainer.compiles,
        recomputed_layers=trainer.activation_plan().recomputed,
        recomputed_mlps=trainer.activation_plan().recomputed_mlps,
        captured=trainer.captures,
    )
