"""The `preference` stage: model + preference pairs -> the better of trained and input model, and the history."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import Problem, RecipeError
from posttrain.methods.preference.config import PreferenceConfig
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

FEW_PAIRS = 100
"""Held-out pairs below which an accuracy moves by a hundredth or more with each of them."""


class Preference(TrainingStage):
    """Train a model to prefer chosen answers over rejected ones (DPO); keep it only if held-out data say so."""

    type: ClassVar[str] = "preference"
    version: ClassVar[str] = "1"
    Config = PreferenceConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="The model to train, and the reference that it is held to."),
        "data": InputSpec("dataset", doc="Rows of `prompt`, `chosen` and `rejected`."),
        "gate_data": InputSpec("dataset", optional=True, doc="Held-out pairs; needed unless keep=trained."),
        "gate_text": InputSpec("dataset", optional=True, doc="Held-out text whose perplexity must not rise."),
    }

    def check(self, cfg: PreferenceConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        problems = [
            *_data_problems(cfg, inputs),
            *_gate_problems(cfg, inputs),
            *_model_problems(cfg, inputs["model"].architecture),
        ]
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: PreferenceConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        arch = inputs["model"].architecture
        tokens, data_tokens = _token_counts(cfg, inputs["data"])
        notes = _gate_notes(cfg, inputs)
        if arch is None:
            return Estimate(tokens=tokens, data_tokens=data_tokens, notes=notes)
        adapters = adapter_parameters(arch, cfg.lora) if cfg.lora else 0
        trainable = adapters or trainable_parameters(arch, cfg.trainable)
        micro_batch_tokens = 2 * cfg.micro_batch() * cfg.sequence_length
        plan = activation_plan(
            arch,
            micro_batch_tokens,
            cfg.precision,
            compiled=cfg.compiles(on_gpu=plans_for_gpu()),
            everything=cfg.gradient_checkpointing,
            budget=cfg.activation_budget,
        )
        reference = None if cfg.lora or cfg.precompute_reference else arch
        memory = training_memory(
            arch, trainable, micro_batch_tokens, 1, precision=cfg.precision, plan=plan, teacher=reference
        )
        if "teacher" in memory:
            memory["reference"] = memory.pop("teacher")
        memory["weights"] += 4 * adapters
        return Estimate(
            parameters=parameter_count(arch),
            notes=(*notes, *budget_notes(arch, micro_batch_tokens, cfg, plan)),
            trainable=trainable,
            tokens=tokens,
            data_tokens=data_tokens,
            memory={**memory, "logits": head_bytes(arch, micro_batch_tokens)},
            cache_bytes_per_token=cache_bytes_per_token(arch),
            disk_bytes=ELEMENT_SIZE[cfg.save_dtype] * parameter_count(arch),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.methods.preference.gated import keep_the_better, read_gate
        from posttrain.methods.preference.train import read_training_pairs, train
        from posttrain.models.loading import load_tokenizer
        from posttrain.training.results import write_history

        began = time.monotonic()
        tokenizer = load_tokenizer(ctx.inputs["model"].path)
        pairs = read_training_pairs(ctx, tokenizer)
        gate = read_gate(ctx, tokenizer, pairs)
        # An interrupted attempt may have left parts.
        ctx.first_does(lambda: shutil.rmtree(ctx.work_dir / "outputs", ignore_errors=True))
        folder = ctx.output_dir("model")
        history = train(ctx, tokenizer, pairs, folder)

        def write() -> None:
            history[-1] |= keep_the_better(ctx, gate, folder)
            write_history(ctx.output_dir("history"), history)

        ctx.first_does(write)
        ctx.record_timing(seconds=time.monotonic() - began)
        return {name: ctx.output_dir(name) for name in self.outputs}


def _token_counts(cfg: PreferenceConfig, data: ArtifactMeta) -> tuple[int, int | None]:
    """Tokens of the whole run and of the data, both sequences of every pair, padding left out."""
    pair = 2 * cfg.sequence_length
    if data.rows and data.tokens is not None:
        pair = min(pair, 2 * -(-data.tokens // data.rows))
    tokens = cfg.max_steps * cfg.pairs_per_step * pair
    return tokens, data.rows * pair if data.rows else (None if data.tokens is None else 2 * data.tokens)


def _data_problems(cfg: PreferenceConfig, inputs: Mapping[str, ArtifactMeta]) -> list[Problem]:
    problems = []
    for name, fix in (("data", "training"), ("gate_data", "held-out")):
        data = inputs.get(name)
        if data is None:
            continue
        where, kinds = f"{name}={cfg.inputs.get(name, '?')}", data.extra.get("rows")
        if data.rows == 0:
            problems.append(Problem(f"the {fix} data has no rows", where, "give a file with preference pairs"))
        elif kinds and "preference" not in kinds.split("+"):
            problem = f"the {fix} data has rows of {' and '.join(kinds.split('+'))}, and no preference pairs"
            fix = "rows {prompt, chosen, rejected}: data=reasoning_gym_pairs, or data.path=pairs.jsonl"
            problems.append(Problem(problem, where, fix))
    return problems


def _gate_problems(cfg: PreferenceConfig, inputs: Mapping[str, ArtifactMeta]) -> list[Problem]:
    if cfg.keep == "trained":
        return []
    needed = "gate_text" if cfg.gate_metric == "perplexity" else "gate_data"
    if needed not in inputs:
        what = "held-out text" if needed == "gate_text" else "held-out pairs"
        problem = f"keep=better compares {cfg.gate_metric} on {what}, and none is given"
        return [Problem(problem, f"inputs.{needed}", f"inputs.{needed}=data.heldout, or keep=trained")]
    if cfg.inputs.get("gate_data") and cfg.inputs.get("gate_data") == cfg.inputs.get("data"):
        problem = f"gate_data is the training data ({cfg.inputs['data']}): a gate needs pairs that were not trained on"
        return [Problem(problem, "inputs.gate_data", "inputs.gate_data=data.heldout")]
    return []


def _gate_notes(cfg: PreferenceConfig, inputs: Mapping[str, ArtifactMeta]) -> tuple[str, ...]:
    gate = inputs.get("gate_data")
    if cfg.keep == "trained" or gate is None or gate.rows is None or gate.rows >= FEW_PAIRS:
        return ()
    return (f"the gate decides by {gate.rows} held-out pairs at most: few for a verdict",)


def _model_problems(cfg: PreferenceConfig, arch: Mapping[str, Any] | None) -> list[Problem]:
    return [*target_problems(cfg.lora, arch), *too_long(cfg, model=arch)] if arch else []
