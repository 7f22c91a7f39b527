"""The `distill` stage: student + teacher + text -> trained student and its history."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import Problem, RecipeError, StageError
from posttrain.methods.distillation.config import DistillConfig
from posttrain.models.architecture import cache_bytes_per_token, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import plans_for_gpu
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage
from posttrain.training.estimate import (
    ELEMENT_SIZE,
    activation_plan,
    budget_notes,
    trainable_parameters,
    training_memory,
)

if TYPE_CHECKING:
    from posttrain.methods.distillation.trainer import DistillTrainer


class Distill(Stage):
    """Train the student to the frozen teacher's next-token distribution on text."""

    type: ClassVar[str] = "distill"
    version: ClassVar[str] = "2"
    Config = DistillConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "student": InputSpec("model", doc="The model to train."),
        "teacher": InputSpec("model", doc="A frozen model with the same tokenizer; often the student's source."),
        "data": InputSpec("dataset", doc="Text to train on."),
    }
    outputs: ClassVar[dict[str, str]] = {"model": "model", "history": "history"}

    def describe(self, cfg: DistillConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        student = inputs["student"]
        model = replace(student, extra={**student.extra, "dtype": cfg.save_dtype})
        return {"model": model, "history": ArtifactMeta(type="history")}

    def check(self, cfg: DistillConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        student, teacher, data = inputs["student"], inputs["teacher"], inputs["data"]
        problems = []
        if student.tokenizer and teacher.tokenizer and student.tokenizer != teacher.tokenizer:
            problems.append(
                Problem(
                    f"student and teacher have different tokenizers (digests {student.tokenizer[:12]} and "
                    f"{teacher.tokenizer[:12]}): their distributions cannot be compared",
                    where=_where(cfg, "student", "teacher"),
                    fix="choose a teacher of the student's family",
                )
            )
        shapes = {"student": student.architecture, "teacher": teacher.architecture}
        sizes = {role: shape["vocab_size"] for role, shape in shapes.items() if shape}
        if len(set(sizes.values())) > 1:
            problems.append(
                Problem(
                    f"the student has {sizes['student']} vocabulary rows, the teacher {sizes['teacher']}",
                    where=_where(cfg, "student", "teacher"),
                    fix="choose a teacher of the same vocabulary, or cut padded rows off the larger embedding",
                )
            )
        for role, shape in shapes.items():
            if shape and cfg.sequence_length > shape["max_position_embeddings"]:
                longest = shape["max_position_embeddings"]
                problems.append(
                    Problem(
                        f"sequence_length {cfg.sequence_length} exceeds the {role}'s {longest} positions",
                        where="sequence_length",
                        fix=f"sequence_length={longest}",
                    )
                )
        if cfg.teacher_device.startswith("cuda") and not plans_for_gpu():
            problems.append(
                Problem(
                    f"teacher_device={cfg.teacher_device}, but the run is planned for a machine without a GPU",
                    where="teacher_device",
                    fix="teacher_device=same",
                )
            )
        if data.rows == 0:
            problems.append(
                Problem("the training data has no documents", where=_where(cfg, "data"), fix="give a file with text")
            )
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: DistillConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        student, teacher = inputs["student"].architecture, inputs["teacher"].architecture
        tokens = cfg.max_steps * cfg.tokens_per_step
        if student is None:
            return Estimate(tokens=tokens, data_tokens=inputs["data"].tokens)
        trainable = trainable_parameters(student, cfg.trainable)
        micro_batch_tokens = cfg.micro_batch() * cfg.sequence_length
        plan = activation_plan(
            student,
            micro_batch_tokens,
            cfg.precision,
            compiled=cfg.compiles(on_gpu=plans_for_gpu()),
            everything=cfg.gradient_checkpointing,
            budget=cfg.activation_budget,
        )
        return Estimate(
            parameters=parameter_count(student),
            notes=budget_notes(student, micro_batch_tokens, cfg, plan),
            trainable=trainable,
            tokens=tokens,
            data_tokens=inputs["data"].tokens,
            memory=training_memory(
                student,
                trainable,
                micro_batch_tokens,
                cfg.chunk_tokens,
                precision=cfg.precision,
                plan=plan,
                logit_copies=4 if cfg.ce_weight else 3,
                teacher=teacher,
                teacher_bytes=ELEMENT_SIZE[cfg.teacher_dtype],
            ),
            cache_bytes_per_token=cache_bytes_per_token(student),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * parameter_count(student),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        import torch

        from posttrain.methods.distillation.data import read_blocks, read_packs
        from posttrain.methods.distillation.trainer import DistillTrainer, teacher_device
        from posttrain.models.loading import load_model, load_tokenizer, save_model
        from posttrain.training.rehearsal import rehearse_save

        cfg: DistillConfig = ctx.config
        if ctx.world_size > 1:
            raise StageError("distill runs on one rank", where="engine.ranks", fix="engine.ranks=1")
        began = time.monotonic()
        tokenizer = load_tokenizer(ctx.inputs["student"].path)
        read = read_packs if cfg.packing == "documents" else read_blocks
        blocks = read(ctx.inputs["data"].path, tokenizer, cfg.sequence_length)
        student = load_model(ctx.inputs["student"].path, device=ctx.device, dtype=torch.float32)
        place = str(teacher_device(cfg.teacher_device, torch.device(ctx.device)))
        teacher = load_model(ctx.inputs["teacher"].path, device=place, dtype=getattr(torch, cfg.teacher_dtype))
        _reset_peak_memory(ctx.device)
        save_dtype = getattr(torch, cfg.save_dtype)
        trainer = DistillTrainer(ctx, cfg, student, teacher, blocks)
        rehearse_save(ctx.work_dir, student, student.config, save_dtype, _disk_needed(cfg, student))
        history = trainer.fit()
        shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True)  # an interrupted attempt may have left parts
        folders = {name: ctx.output_dir(name) for name in self.outputs}
        source = ctx.inputs["student"].path
        save_model(student.eval(), tokenizer, folders["model"], dtype=save_dtype, tokenizer_from=source)
        _write_history(folders["history"], history)
        _record(ctx, trainer, history, blocks, time.monotonic() - began)
        return folders

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        if name != "model":
            return predicted
        from posttrain.models.inspect import model_meta

        found = model_meta(path)
        return replace(found, extra={**predicted.extra, **found.extra})


def _where(cfg: DistillConfig, *roles: str) -> str:
    return ", ".join(f"{role}={cfg.inputs.get(role, '?')}" for role in roles)


def _disk_needed(cfg: DistillConfig, model: Any) -> int:
    """Bytes of the kept checkpoints with one in the making (weights and two moments), and of the saved model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total = sum(size for size, _ in sizes)
    checkpoint = 4 * total + 8 * sum(size for size, trained in sizes if trained)
    return (cfg.keep_checkpoints + 1) * checkpoint + ELEMENT_SIZE[cfg.save_dtype] * total


def _write_history(folder: Path, history: list[dict[str, float]]) -> None:
    from posttrain.pipeline.files import write_text

    write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def _record(
    ctx: StageContext, trainer: DistillTrainer, history: list[dict[str, float]], blocks: Any, seconds: float
) -> None:
    cfg: DistillConfig = ctx.config
    tail = history[-max(1, len(history) // 10) :]
    tokens, rows = len(history) * cfg.tokens_per_step, len(blocks)
    if cfg.packing == "documents":
        tokens, rows = sum(trainer.train_dataset.totals(step)[0] for step in range(len(history))), len(blocks.ids)
        ctx.record_result(padding=blocks.waste)
    ctx.record_result(
        steps=len(history),
        tokens=tokens,
        epochs=len(history) * cfg.sequences_per_step / rows,
        final_loss=history[-1]["loss"],
        final_kl=history[-1]["kl"],
        last_tenth_kl=sum(row["kl"] for row in tail) / len(tail),
    )
    ctx.record_timing(
        seconds=seconds,
        tokens_per_second=trainer.watch.tokens_per_second,
        peak_memory_bytes=_peak_memory(ctx.device),
        micro_batch=cfg.micro_batch(),
        compiled=trainer.compiles,
        recomputed_layers=trainer.activation_plan().recomputed,
        recomputed_mlps=trainer.activation_plan().recomputed_mlps,
        captured=trainer.captures,
    )


def _reset_peak_memory(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(device: str) -> int:
    """Peak bytes of the device's memory, or of this process on a CPU (loading and libraries included)."""
    import resource

    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
