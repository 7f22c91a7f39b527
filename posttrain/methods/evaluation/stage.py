"""The `evaluate` stage: one model, an optional baseline, one data set; deterministic figures and timings apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import Problem, RecipeError
from posttrain.methods.evaluation.config import WIDE_BYTES, EvaluateConfig, NeedleSettings, ProblemSettings
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage, StageConfig

ELEMENT_SIZE = {"fp32": 4, "bf16": 2}
"""Bytes of one weight, activation or cache element."""

PROMPT_TOKENS = 256
"""A problem with its chat template, for estimates."""


class Evaluate(Stage):
    """Perplexity, KL and top-1 agreement with the baseline, cache bytes, speed, samples, pass@k, retrieval."""

    type: ClassVar[str] = "evaluate"
    version: ClassVar[str] = "2"
    Config: ClassVar[type[StageConfig]] = EvaluateConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", doc="The model to measure."),
        "baseline": InputSpec("model", optional=True, doc="The model to compare with, usually the source."),
        "data": InputSpec("dataset", doc="Held-out documents, which are also the problems of `problems`."),
    }
    outputs: ClassVar[dict[str, str]] = {"evaluation": "evaluation"}

    def external(self, cfg: EvaluateConfig) -> dict[str, Any]:
        """Versions of the packages that decide scores, where answers are scored."""
        if cfg.problems is None:
            return {}
        from posttrain.rewards.score import identity

        return {"reward": identity(cfg.problems.reward, "problems.reward of an evaluate stage")}

    def describe(self, cfg: EvaluateConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        return {"evaluation": ArtifactMeta("evaluation")}

    def check(self, cfg: EvaluateConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        problems = _data_problems(inputs["data"])
        if cfg.problems is not None:
            problems += _unscorable(cfg.problems, inputs["data"])
        if cfg.needle is not None:
            problems += _too_long(cfg.needle, inputs)
        if baseline := inputs.get("baseline"):
            problems += _baseline_problems(inputs["model"], baseline)
        if problems:
            raise RecipeError(problems=problems)

    def estimate(self, cfg: EvaluateConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        architectures = [
            meta.architecture for name in ("model", "baseline") if (meta := inputs.get(name)) and meta.architecture
        ]
        if not architectures:
            return Estimate()
        from posttrain.models.architecture import cache_bytes_per_token, parameter_count

        window = int(min(cfg.max_tokens, position_limit(architectures)))
        rows = inputs["data"].rows
        documents = cfg.max_documents if rows is None else min(cfg.max_documents, rows)
        answers = 0 if cfg.problems is None else _answer_tokens(cfg.problems, rows)
        needle = 0 if cfg.needle is None else cfg.needle.prompt_tokens
        notes = _warnings(cfg)
        if window < cfg.max_tokens:
            notes.append(f"windows of {window} tokens: the model's max_position_embeddings")
        return Estimate(
            parameters=parameter_count(architectures[0]),
            tokens=(documents * window * cfg.max_windows + answers + needle) * len(architectures),
            memory=_memory(cfg, architectures, window),
            cache_bytes_per_token=cache_bytes_per_token(architectures[0]),
            notes=tuple(notes),
        )

    def run(self, ctx: StageContext) -> dict[str, Path]:
        from posttrain.methods.evaluation.evaluate import evaluate

        return {"evaluation": evaluate(ctx)}


def _warnings(cfg: EvaluateConfig) -> list[str]:
    """What can be meant, and mostly is not."""
    model, baseline, data = (cfg.inputs.get(name, "").removesuffix(".model") for name in ("model", "baseline", "data"))
    found = []
    if data.endswith(".train"):
        found.append(f"{data} is what is trained on: its figures do not say how the model does on new text (.heldout)")
    if model and model == baseline:
        found.append(f"{model} is its own baseline: differences to the baseline are all 0")
    return found


def position_limit(architectures: Iterable[Mapping[str, Any]]) -> float:
    """The smallest `max_position_embeddings`; infinity where none is known."""
    return min((limit for arch in architectures if (limit := arch.get("max_position_embeddings"))), default=math.inf)


def _memory(cfg: EvaluateConfig, architectures: list[dict[str, Any]], window: int) -> dict[str, int]:
    """Peak bytes by term; the cache is that of the speed run."""
    from posttrain.models.architecture import (
        cache_bytes_per_token,
        cache_state_bytes,
        layer_parameters,
        parameter_count,
    )

    size = ELEMENT_SIZE[cfg.precision]
    memory = {"weights": parameter_count(architectures[0]) * size}
    if len(architectures) > 1:
        memory["baseline weights"] = parameter_count(architectures[1]) * size
    if cfg.repeats or cfg.prompts or cfg.problems:
        # The decoder packs the projections of a layer's input and shares the rest; at most all but the down projection.
        memory["decoder"] = size * sum(
            layer_parameters(arch, layer) - arch["hidden_size"] * arch["intermediate_size"]
            for arch in architectures
            for layer in range(arch["num_hidden_layers"])
        )
    arch = architectures[0]
    longest = 0 if cfg.needle is None else cfg.needle.lengths[-1]
    rows = max(window, cfg.batch_size * cfg.prefill_tokens, longest)
    # A layer at once: the residual stream, its norm, and the three MLP intermediates.
    memory["activations"] = rows * size * (4 * arch["hidden_size"] + 3 * arch["intermediate_size"])
    # Logits, log-probabilities of both models and their product, fp32.
    memory["logits"] = min(cfg.chunk_tokens, window) * arch["vocab_size"] * 4 * (2 + 2 * len(architectures))
    per_token = max(cache_bytes_per_token(item, size) for item in architectures)
    slots, sequences = cfg.batch_size * (cfg.prefill_tokens + cfg.decode_tokens), cfg.batch_size
    if cfg.problems is not None:
        slots = max(slots, cfg.problems.batch_rows * (PROMPT_TOKENS + cfg.problems.max_new_tokens))
        sequences = max(sequences, cfg.problems.batch_rows)
        # Logits of a step in the model's precision, and their weights in fp32.
        memory["sampling"] = cfg.problems.batch_rows * arch["vocab_size"] * (size + 4)
    # Of a prompt and of what goes on from it; a layer grows by being copied.
    slots, sequences = max(slots, 2 * longest), max(sequences, 2 if longest else 0)
    per_sequence = max(cache_state_bytes(item, size) for item in architectures)
    memory["cache"] = slots * per_token + sequences * per_sequence
    if cfg.needle is not None:
        # Of candidates that are read side by side: copies of the cache, and logits in fp32 with what is taken of them.
        rows = min(cfg.needle.candidates, max(1, WIDE_BYTES // (longest * per_token + per_sequence)))
        memory["candidates"] = rows * (
            longest * per_token + per_sequence + 12 * cfg.needle.max_new_tokens * arch["vocab_size"]
        )
    return memory


def _answer_tokens(cfg: ProblemSettings, rows: int | None) -> int:
    """Tokens that one model writes at most."""
    problems = cfg.max_problems if rows is None else min(cfg.max_problems, rows)
    return problems * cfg.samples * cfg.max_new_tokens


def _unscorable(cfg: ProblemSettings, data: ArtifactMeta) -> list[Problem]:
    """What is known to be missing in the rows for them to be asked and scored."""
    fields, needs = data.extra.get("fields"), cfg.reward.needs
    if data.extra.get("rows") == "text":
        lack = "its rows are plain text"
    elif fields is not None and needs and not set(needs) & set(fields):
        lack = f"its rows have no {' or '.join(f'`{field}`' for field in needs)}"
    else:
        return []
    return [
        Problem(
            f"the data has no problems that reward {cfg.reward.type} can score: {lack}",
            where="problems",
            fix="inputs.data: a data set with right answers (data=reasoning_gym_rl, data=math), another "
            "problems.reward, or problems=null",
        )
    ]


def _too_long(cfg: NeedleSettings, inputs: Mapping[str, ArtifactMeta]) -> list[Problem]:
    """Prompts that some model has no positions for."""
    metas = (inputs.get("model"), inputs.get("baseline"))
    limit = position_limit(meta.architecture for meta in metas if meta and meta.architecture)
    if cfg.lengths[-1] <= limit:
        return []
    fitting = [length for length in cfg.lengths if length <= limit] or [int(limit)]
    return [
        Problem(
            f"a prompt of {cfg.lengths[-1]} tokens exceeds the {limit:.0f} positions (max_position_embeddings) of the "
            "model or its baseline",
            where="needle.lengths",
            fix=f"needle.lengths={str(fitting).replace(' ', '')}, or a model whose max_position_embeddings is larger",
        )
    ]


def _data_problems(data: ArtifactMeta) -> list[Problem]:
    if data.rows is None or data.rows >= 2:
        return []
    found = "no document" if data.rows == 0 else "one document only"
    return [
        Problem(
            f"the evaluation data has {found}; at least 2 are needed (intervals are taken over documents)",
            where="inputs.data",
            fix="give a file with more rows or a folder with more text files (data.path=…), or hold out more: "
            "data.heldout_fraction=0.3",
        )
    ]


def _baseline_problems(model: ArtifactMeta, baseline: ArtifactMeta) -> list[Problem]:
    where = "inputs.baseline"
    fix = "give the model that this one was made from, or no baseline: `~inputs.baseline`"
    if model.tokenizer and baseline.tokenizer and model.tokenizer != baseline.tokenizer:
        digests = f"{model.tokenizer[:12]} and {baseline.tokenizer[:12]}"
        return [Problem(f"the model and its baseline have different tokenizers ({digests})", where, fix)]
    sizes = [meta.architecture.get("vocab_size") for meta in (model, baseline) if meta.architecture]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        return [Problem(f"the model and its baseline have vocabularies of {sizes[0]} and {sizes[1]}", where, fix)]
    return []
