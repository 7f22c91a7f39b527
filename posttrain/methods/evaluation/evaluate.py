"""What `Evaluate.run` does: load, score document by document, measure, write the evaluation artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.data.reading import encode_documents, read_rows
from posttrain.errors import PosttrainError, fail
from posttrain.methods.evaluation import measure
from posttrain.methods.evaluation.metrics import Sums, perplexity, summarise
from posttrain.methods.evaluation.needle import measure_needle
from posttrain.methods.evaluation.problems import measure_problems
from posttrain.methods.evaluation.samples import greedy_answers
from posttrain.methods.evaluation.scoring import Document, Logits, PartialResults, make_documents, score_document
from posttrain.methods.evaluation.stage import ELEMENT_SIZE, position_limit
from posttrain.models.loading import load_model, load_tokenizer
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear, write_json, write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def evaluate(ctx: StageContext) -> Path:
    """Evaluate `ctx.inputs["model"]`; the folder of the evaluation artifact.

    Continues from `work_dir/partial.jsonl`. Raises StageError for data that cannot be scored and for NaN.
    """
    cfg = ctx.config
    data = ctx.inputs["data"].path
    models = {
        name: load_model(ctx.inputs[name].path, device=ctx.device, dtype=DTYPES[cfg.precision]).eval()
        for name in ("model", "baseline")
        if name in ctx.inputs
    }
    tokenizer = load_tokenizer(ctx.inputs["model"].path)
    limit = position_limit(model.config.to_dict() for model in models.values())
    window = int(min(cfg.max_tokens, limit))
    documents = _read_documents(data, tokenizer, cfg.max_documents, window, cfg.max_windows)
    sums = _score(ctx, models, documents)

    settings = {"precision": cfg.precision, "window_tokens": window, "data_sha256": _sha256(data / "rows.jsonl")}
    figures = summarise(sums, sum(document.text_bytes for document in documents), cfg.bootstrap_samples, ctx.seed)
    figures |= _sizes(models, cfg.precision)
    boundary = _boundary(ctx, len(documents))
    problems = None if cfg.problems is None else measure_problems(models, tokenizer, read_rows(data), limit, ctx)
    figures |= {} if problems is None else problems.figures()
    needle = None if cfg.needle is None else measure_needle(models, tokenizer, read_rows(data), limit, ctx)
    figures |= {} if needle is None else needle.figures()
    answers = {}
    for name, model in models.items():
        boundary()
        answers[name] = greedy_answers(model, tokenizer, cfg.prompts, cfg.generate_tokens)
    _measure_speed(ctx, models, limit, boundary)

    folder = ctx.output_dir("evaluation")
    clear(folder)
    rows = [_document_row(*pair) for pair in zip(documents, sums, strict=True)]
    write_json(folder / "metrics.json", {"format": 1, **settings, **figures})
    write_text(folder / "documents.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    samples = [
        {"prompt": prompt, **{name: texts[index] for name, texts in answers.items()}}
        for index, prompt in enumerate(cfg.prompts)
    ]
    write_json(folder / "samples.json", samples)
    if problems is not None:
        problems.write(folder)
    if needle is not None:
        needle.write(folder)
    ctx.record_result(**settings, **figures)
    return folder


def _read_documents(folder: Path, tokenizer: Any, count: int, window: int, max_windows: int) -> list[Document]:
    rows = read_rows(folder)[:count]
    documents = make_documents(rows, encode_documents(rows, tokenizer), tokenizer, window, max_windows)
    if len(documents) < 2:
        fail(
            f"the evaluation data has {len(documents)} documents of two tokens or more; at least 2 are needed",
            where=str(folder / "rows.jsonl"),
            fix="give a file with more rows, or a folder with more text files: data.path=…",
        )
    return documents


def _score(ctx: StageContext, models: dict[str, Any], documents: list[Document]) -> list[Sums]:
    logits = {name: Logits(model) for name, model in models.items()}
    partial = PartialResults(ctx.work_dir / "partial.jsonl")
    tokens = 0
    for index, document in enumerate(documents):
        if index not in partial.sums:
            if ctx.should_stop():
                ctx.stop(index)
            sums = score_document(document, logits["model"], logits.get("baseline"), ctx.config.chunk_tokens)
            partial.add(index, sums)
        tokens += document.tokens
        ctx.progress(index + 1, len(documents), unit="document", tokens=tokens)
    return [partial.sums[index] for index in range(len(documents))]


def _boundary(ctx: StageContext, done: int) -> Callable[[], None]:
    """Between two measurements: everything scored so far is on disk, so a stop costs the measurements only."""

    def stop_if_asked() -> None:
        if ctx.should_stop():
            ctx.stop(done)

    return stop_if_asked


def _sizes(models: dict[str, Any], precision: str) -> dict[str, Any]:
    """Parameters and cache of every model; ratios to plain attention where one of them has constant states."""
    figures = {name: _size(model, precision) for name, model in models.items()}
    states = any(one["kv_constant_bytes"] or one.get("kv_constant_bytes_predicted") for one in figures.values())
    found: dict[str, Any] = {}
    for name, one in figures.items():
        found |= _prefixed(name, one if states else {key: one[key] for key in one if key not in STATES})
    return found


STATES = ("kv_constant_bytes_predicted", "cache_ratio_without_states", "cache_ratio_with_states")
"""Figures that say something only beside a model with constant states."""


def _size(model: Any, precision: str) -> dict[str, Any]:
    from posttrain.models.architecture import cache_bytes_per_token, cache_ratios_at, cache_state_bytes, normalise

    size = ELEMENT_SIZE[precision]
    per_token, constant = measure.cache_bytes(model)
    figures = {
        "parameters": measure.parameter_count(model),
        "kv_bytes_per_token_predicted": None,
        "kv_bytes_per_token_measured": per_token,
        "kv_constant_bytes": constant,
    }
    try:
        arch = normalise(model.config.to_dict())
    except PosttrainError:
        # A family without a formula is still measured; its table cell stays empty.
        return figures
    return {
        **figures,
        "kv_bytes_per_token_predicted": cache_bytes_per_token(arch, size),
        "kv_constant_bytes_predicted": cache_state_bytes(arch, size),
        **cache_ratios_at(arch, size),
    }


def _measure_speed(ctx: StageContext, models: dict[str, Any], limit: float, boundary: Callable[[], None]) -> None:
    """Record tokens per second and peak memory; prompt and decoding together never exceed `limit` positions."""
    cfg = ctx.config
    decode = int(min(cfg.decode_tokens, limit // 2))
    prefill = int(min(cfg.prefill_tokens, limit - decode))
    # The speed runs reset the device's account: the peak of what came before is read first.
    device_peak = torch.cuda.max_memory_allocated() if ctx.device == "cuda" else 0
    if cfg.repeats:
        speeds = measure.throughput(
            models,
            prefill_tokens=prefill,
            decode_tokens=decode,
            batch_size=cfg.batch_size,
            repeats=cfg.repeats,
            boundary=boundary,
        )
        for name, figures in speeds.items():
            ctx.record_timing(**_prefixed(name, figures))
        ctx.record_timing(prefill_tokens=prefill, decode_tokens=decode, batch_size=cfg.batch_size)
    ctx.record_timing(device=ctx.device, process_peak_bytes=measure.process_peak_bytes())
    if ctx.device == "cuda":
        device_peak = max(device_peak, torch.cuda.max_memory_allocated())
        ctx.record_timing(device_name=torch.cuda.get_device_name(), device_peak_bytes=device_peak)
    else:
        ctx.record_timing(threads=torch.get_num_threads())


def _prefixed(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    prefix = "" if name == "model" else f"{name}_"
    return {prefix + key: value for key, value in figures.items()}


def _document_row(document: Document, sums: Sums) -> dict[str, Any]:
    row = {"id": document.id, "bytes": document.text_bytes, **sums.to_json()}
    row["perplexity"] = perplexity(sums.nll, sums.tokens)
    if sums.baseline_nll is not None:
        row["baseline_perplexity"] = perplexity(sums.baseline_nll, sums.tokens)
    return row


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
