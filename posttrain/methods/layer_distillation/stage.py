"""The `ild` stage: a converted model and its source in, the model with every layer aligned to the source's out."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.errors import Problem, RecipeError
from posttrain.methods.layer_distillation.config import IldConfig
from posttrain.models.architecture import cache_bytes_per_token, layer_parameters, mixer_parameters, parameter_count
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.device import planned_ranks
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec
from posttrain.training.estimate import ADAM_MOMENTS, ELEMENT_SIZE, widest_layer_bytes_per_token
from posttrain.training.input_checks import given, no_documents, too_long, unfit_teacher
from posttrain.training.stage import TrainingStage

if TYPE_CHECKING:
    from posttrain.methods.layer_distillation.trainer import LayerTrainer

SHARED_FIELDS = ("hidden_size", "num_hidden_layers", "vocab_size")
"""What student and teacher must have alike: layers are compared one to one, over one stream, on the same tokens."""
SOURCE = "give the model that the student was converted from"


class Ild(TrainingStage):
    """Train each layer of a converted model alone, from the source's hidden states to the source layer's outputs."""

    type: ClassVar[str] = "ild"
    Config = IldConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "student": InputSpec("model", doc="The model to train, converted from the teacher."),
        "teacher": InputSpec("model", doc="Its frozen source: as many layers of the same width."),
        "data": InputSpec("dataset", doc="Text to train on."),
    }
    trains: ClassVar[str] = "student"

    def check(self, cfg: IldConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        student, teacher = inputs["student"], inputs["teacher"]
        ours, theirs = student.architecture, teacher.architecture
        problems = unfit_teacher(
            cfg,
            student,
            teacher,
            idle="every layer gives its own states already",
            apart="they read the same text as other tokens",
            fix=SOURCE,
        )
        if ours and theirs:
            unlike = [f"{name} {ours[name]} and {theirs[name]}" for name in SHARED_FIELDS if ours[name] != theirs[name]]
            if unlike:
                problems.append(
                    Problem(
                        f"layers of student and teacher cannot be compared: {', '.join(unlike)}",
                        where=given(cfg, "student", "teacher"),
                        fix=SOURCE,
                    )
                )
        problems += too_long(cfg, student=ours, teacher=theirs)
        problems += no_documents(cfg, inputs["data"])
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: IldConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        student, teacher = inputs["student"].architecture, inputs["teacher"].architecture
        tokens, data_tokens = cfg.max_steps * cfg.tokens_per_step, inputs["data"].tokens
        if student is None:
            return Estimate(tokens=tokens, data_tokens=data_tokens)
        by_layer = trained_parameters(student, cfg.trainable)
        total, trained = parameter_count(student), sum(by_layer)
        passing = cfg.micro_batch(1) * cfg.sequence_length
        kept = widest_layer_bytes_per_token(student, cfg.precision) + 16 * student["hidden_size"]
        residual = 2 if cfg.residual_dtype == "bfloat16" else 4
        memory = {
            "weights": 4 * total,
            "teacher": 4 * parameter_count(teacher or student),
            "optimizer": ADAM_MOMENTS * 4 * trained // planned_ranks(),
            "gradients": 4 * max(by_layer),
            "hidden states": residual * cfg.tokens_per_step * student["hidden_size"],
            "activations": passing * kept,
        }
        return Estimate(
            parameters=total,
            trainable=trained,
            tokens=tokens,
            data_tokens=data_tokens,
            memory=memory,
            cache_bytes_per_token=cache_bytes_per_token(student),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * total,
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        import torch

        from posttrain.methods.layer_distillation.trainer import LayerTrainer
        from posttrain.models.loading import load_model, load_tokenizer, save_model
        from posttrain.training.blocks import read_blocks
        from posttrain.training.rehearsal import rehearse_save
        from posttrain.training.results import disk_needed, reset_peak_memory, write_history

        cfg: IldConfig = ctx.config
        began = time.monotonic()
        source, save_dtype = ctx.inputs["student"].path, getattr(torch, cfg.save_dtype)
        tokenizer = load_tokenizer(source)
        blocks = read_blocks(ctx.inputs["data"].path, tokenizer, cfg.sequence_length)
        student, teacher = (
            load_model(ctx.inputs[role].path, device=ctx.device, dtype=torch.float32) for role in ("student", "teacher")
        )
        reset_peak_memory(ctx.device)
        trainer = LayerTrainer(ctx, cfg, student, teacher, blocks)
        needed = disk_needed(student, cfg.keep_checkpoints, cfg.save_dtype)
        ctx.first_does(lambda: rehearse_save(ctx.work_dir, student, student.config, save_dtype, needed))
        history = trainer.fit()
        trainer.finish()

        def write() -> None:
            shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True)  # an interrupted attempt may have left parts
            save_model(student.eval(), tokenizer, ctx.output_dir("model"), dtype=save_dtype, tokenizer_from=source)
            write_history(ctx.output_dir("history"), history)

        ctx.first_does(write)
        _record(ctx, trainer, history, len(blocks), time.monotonic() - began)
        return {name: ctx.output_dir(name) for name in self.outputs}


def trained_parameters(arch: Mapping[str, Any], trainable: str) -> list[int]:
    """Parameters with gradients, of every layer."""
    layers = range(arch["num_hidden_layers"])
    counts = [(mixer_parameters if trainable == "mixer" else layer_parameters)(arch, layer) for layer in layers]
    counts[-1] += arch["hidden_size"] if trainable == "all" else 0
    return counts


def layer_names(row: Mapping[str, float]) -> list[str]:
    """The layers' losses in a row of the history, by number."""
    return sorted((name for name in row if name.startswith("layer_")), key=lambda name: int(name[6:]))


def _record(
    ctx: StageContext, trainer: LayerTrainer, history: list[dict[str, float]], rows: int, seconds: float
) -> None:
    from posttrain.training.results import last_tenth, peak_memory

    cfg: IldConfig = ctx.config
    layers = layer_names(history[0])
    # The first step's loss is that of the model as it came: nothing has been trained yet.
    first, last = ([row(name) for name in layers] for row in (history[0].get, lambda name: last_tenth(history, name)))
    ctx.record_result(
        steps=len(history),
        tokens=len(history) * cfg.tokens_per_step,
        epochs=len(history) * cfg.sequences_per_step / rows,
        first_loss=history[0]["loss"],
        final_loss=history[-1]["loss"],
        last_tenth_loss=last_tenth(history, "loss"),
        first_layer_losses=first,
        last_tenth_layer_losses=last,
        # A layer that is the teacher's own has no loss to lower.
        least_fall=min((1 - end / start for start, end in zip(first, last, strict=True) if start), default=0.0),
    )
    ctx.record_timing(
        seconds=seconds,
        tokens_per_second=trainer.watch.tokens_per_second,
        peak_memory_bytes=peak_memory(ctx.device),
        gradient_bytes=trainer.gradient_bytes,
        micro_batch=cfg.micro_batch(1),
        compiled=trainer.compiles,
    )
