"""What a run shows, as numbers: one row a measured model, gap recovered, estimates beside measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import PosttrainError
from posttrain.pipeline.files import read_json
from posttrain.report.read import Json, RunRecord, StageRecord, read_lines

BASELINE = "baseline_"
MODEL_SOURCE = "model_source"


@dataclass(frozen=True)
class Row:
    """One measured model: the source (a baseline) or what a stage made.

    Attributes:
        label: "source" or "after STAGE"; `measured_by` is the evaluation's stage name.
        compared_with: key of the model it is compared with, None for a source or without a baseline.
        values, timing: the evaluation's metrics without the `baseline_` prefix.
        documents: per document `{"id", "perplexity", "baseline_perplexity"?, "tokens", …}`.
    """

    label: str
    measured_by: str
    values: Json
    timing: Json
    compared_with: str | None = None
    model_label: str = ""
    documents: list[Json] = field(default_factory=list)

    @property
    def is_source(self) -> bool:
        return self.label.startswith("source")

    def comparable(self, other: Row) -> bool:
        """Same data, windows, precision and baseline, so that their perplexities may be set against each other."""
        same = ("data_sha256", "window_tokens", "precision", "tokens", "documents")
        return self.compared_with == other.compared_with and all(
            self.values.get(key) == other.values.get(key) for key in same
        )


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation stage with its parts."""

    stage: StageRecord
    documents: list[Json]
    samples: list[Json]


def evaluations(run: RunRecord) -> list[Evaluation]:
    """Finished stages with an evaluation artifact, in execution order."""
    found = []
    for stage in run.stages:
        for folder, _ in stage.outputs("evaluation"):
            samples = read_json(folder / "samples.json") if (folder / "samples.json").is_file() else []
            found.append(Evaluation(stage, read_lines(folder / "documents.jsonl"), samples))
    return found


def model_label(run: RunRecord, stage_name: str) -> str:
    """How results name a model: the `label` of a source model, "after STAGE" for what a stage made of it."""
    stage = run.stage(stage_name)
    if stage is None or stage.type != MODEL_SOURCE:
        return f"after {stage_name}"
    labels = [(meta.get("extra") or {}).get("label") for _, meta in stage.outputs("model")]
    return str(next(filter(None, labels), stage_name))


def rows(run: RunRecord) -> list[Row]:
    """A source row for each baseline (once), then a row for each evaluated model, in execution order."""
    table: list[Row] = []
    sources: set[tuple[Any, ...]] = set()
    for evaluation in evaluations(run):
        stage = evaluation.stage
        baseline = stage.inputs.get("baseline")
        if baseline and "baseline_perplexity" in stage.result:
            identity = (baseline["key"], baseline["output"], *(stage.result.get(k) for k in _CONDITIONS))
            if identity not in sources:
                table.append(_source_row(run, evaluation, baseline, first=not sources))
                sources.add(identity)
        table.append(_model_row(run, evaluation, baseline))
    return table


_ELEMENT_SIZE = {"fp32": 4, "bf16": 2}
_CONDITIONS = ("data_sha256", "window_tokens", "precision")


def _source_row(run: RunRecord, evaluation: Evaluation, baseline: Json, *, first: bool) -> Row:
    stage = evaluation.stage
    shared = {
        key: stage.result[key] for key in (*_CONDITIONS, "tokens", "documents", "text_bytes") if key in stage.result
    }
    return Row(
        label="source" if first else f"source of {stage.name}",
        measured_by=stage.name,
        values={**shared, **_stripped(stage.result)},
        timing={**_machine(stage.timing), **_stripped(stage.timing)},
        model_label=model_label(run, baseline["stage"]),
        documents=[{**_stripped(row), "id": row["id"]} for row in evaluation.documents],
    )


def _model_row(run: RunRecord, evaluation: Evaluation, baseline: Json | None) -> Row:
    stage = evaluation.stage
    model = stage.inputs.get("model") or {"stage": stage.name}
    return Row(
        label=model_label(run, model["stage"]),
        measured_by=stage.name,
        values={key: value for key, value in stage.result.items() if not key.startswith(BASELINE)},
        timing={key: value for key, value in stage.timing.items() if not key.startswith(BASELINE)},
        compared_with=f"{baseline['key']}/{baseline['output']}" if baseline else None,
        documents=evaluation.documents,
    )


def _stripped(metrics: Json) -> Json:
    return {key.removeprefix(BASELINE): value for key, value in metrics.items() if key.startswith(BASELINE)}


def _machine(timing: Json) -> Json:
    keys = ("device", "device_name", "threads", "process_peak_bytes", "prefill_tokens", "decode_tokens", "batch_size")
    return {key: timing[key] for key in keys if key in timing}


@dataclass(frozen=True)
class Recovery:
    """How much of the gap that the first compared stage opened was closed again by the time of `row`."""

    row: Row
    reference: Row
    perplexity: float
    nll: float


def recoveries(run: RunRecord) -> Iterator[Recovery]:
    """`1 - (value - source) / (first - source)` for each later row that is comparable with the first compared row.

    Nothing where the first compared row lost nothing: there is no gap to recover.
    """
    evaluated = {evaluation.stage.name: evaluation.stage.result for evaluation in evaluations(run)}
    compared = [row for row in rows(run) if row.compared_with]
    for index, row in enumerate(compared):
        first = next((other for other in compared[:index] if other.comparable(row)), None)
        if first is None:
            continue
        source = evaluated[first.measured_by]
        shares = []
        for name in ("perplexity", "nll"):
            gap = first.values[name] - source[BASELINE + name]
            if gap <= 0:
                break
            shares.append(1 - (row.values[name] - source[BASELINE + name]) / gap)
        if len(shares) == 2:
            yield Recovery(row, first, *shares)


@dataclass(frozen=True)
class Comparison:
    """A number of the plan beside what was measured."""

    stage: str
    quantity: str
    estimated: float
    measured: float
    unit: str


def estimates(run: RunRecord) -> list[Comparison]:
    """Each finished stage's estimate beside its measurement, for the quantities that have both."""
    found = []
    for stage in run.stages:
        if stage.manifest is None:
            continue
        estimate = stage.manifest.get("estimate") or {}
        memory = sum((estimate.get("memory") or {}).values()) or None
        # An evaluation estimates the tokens of every model it runs and counts the scored tokens of the text.
        models = 2 if "baseline_nll" in stage.result else 1
        tokens = stage.result.get("tokens")
        processed = None if tokens is None else tokens * models + further_tokens(stage.result)
        pairs = (
            ("parameters", estimate.get("parameters"), stage.result.get("parameters"), ""),
            ("trainable parameters", estimate.get("trainable"), stage.result.get("trainable"), ""),
            ("tokens processed", estimate.get("tokens"), processed, ""),
            ("peak memory", memory, _peak(stage.timing), "B"),
            (
                f"KV cache per token ({stage.result.get('precision')})",
                _planned_cache(stage, estimate),
                _cache(stage),
                "B",
            ),
            ("disk", estimate.get("disk_bytes"), stage.bytes_on_disk or None, "B"),
        )
        found += [Comparison(stage.name, *pair) for pair in pairs if None not in pair[1:3]]
    return found


def _planned_cache(stage: StageRecord, estimate: Json) -> Any:
    """The plan's cache bytes, which are those of 2-byte elements, in the precision that was measured."""
    planned, element = estimate.get("cache_bytes_per_token"), _ELEMENT_SIZE.get(str(stage.result.get("precision")))
    return None if planned is None or element is None else planned * element / 2


def _cache(stage: StageRecord) -> Any:
    return stage.result.get("kv_bytes_per_token_measured")


def _peak(timing: Json) -> Any:
    keys = ["peak_memory_bytes", "device_peak_bytes", "process_peak_bytes", "peak_bytes"]
    if timing.get("device") == "cuda":
        # What the process holds on the host is not what the plan estimates for a device.
        keys.remove("process_peak_bytes")
    return next((timing[key] for key in keys if timing.get(key)), None)


def further_tokens(result: Json) -> int:
    """Tokens that the models of an evaluation wrote in answer to problems, and those of prompts that hid a needle."""
    answers = (result.get("problems") or {}).get("answers") or {}
    return sum(figures["tokens"] for figures in answers.values()) + (result.get("needle") or {}).get("tokens", 0)


def conversions(run: RunRecord) -> list[tuple[StageRecord, list[Json]]]:
    """Per-layer records of every finished conversion artifact: any list of objects with a `layer` in its JSON."""
    found = []
    for stage in run.stages:
        for folder, _ in stage.outputs("conversion"):
            document = read_json(folder / "conversion.json")
            candidates = document.values() if isinstance(document, dict) else [document]
            for value in candidates:
                if isinstance(value, list) and value and isinstance(value[0], dict) and "layer" in value[0]:
                    found.append((stage, value))
                    break
    return found


def datasets(run: RunRecord) -> list[tuple[str, Json]]:
    """`dataset.json` of every dataset in the run, by `stage.output`."""
    return [
        (f"{stage.name}.{folder.name}", read_json(folder / "dataset.json"))
        for stage in run.stages
        for folder, _ in stage.outputs("dataset")
        if (folder / "dataset.json").is_file()
    ]


def settings(stage: StageRecord) -> list[tuple[str, Any, Any]]:
    """`(field, value, default)` of the settings that differ from the stage type's defaults.

    For a stage type this installation does not have, all settings with no default.
    """
    config = {k: v for k, v in ((stage.manifest or {}).get("config") or {}).items() if k not in ("type", "inputs")}
    from posttrain.config import registry

    try:
        fields = registry.stage(stage.type).Config.model_fields
    except (KeyError, PosttrainError):
        return [(name, value, None) for name, value in config.items()]
    changed = []
    for name, value in config.items():
        default = fields[name].get_default(call_default_factory=True) if name in fields else None
        changed += _differences(name, _plain(value), _plain(default))
    return changed


def _differences(name: str, value: Any, default: Any) -> list[tuple[str, Any, Any]]:
    """Where two values differ: within sections that both have, field by field."""
    if not (isinstance(value, dict) and isinstance(default, dict) and default):
        return [(name, value, default)] if value != default else []
    return [found for key, item in value.items() for found in _differences(f"{name}.{key}", item, default.get(key))]


def _plain(value: Any) -> Any:
    """As it is read from JSON: models as objects, tuples as lists."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
