"""The report of a run as blocks: what happened, the plots, the table, and everything needed to repeat it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

from posttrain.report import card, card_text, cards, facts, plots
from posttrain.report.blocks import Block, Bullets, Code, Figure, Graph, Heading, Node, Notice, Sample, Table, Text
from posttrain.report.caches import beside_growth, caches
from posttrain.report.facts import Row
from posttrain.report.gates import gates
from posttrain.report.layers import by_layer
from posttrain.report.limits import limits
from posttrain.report.needle import needles
from posttrain.report.numbers import NONE, byte_size, duration, percent, significant, whole, with_interval
from posttrain.report.problems import problems
from posttrain.report.read import RunRecord, StageRecord


def title(run: RunRecord) -> str:
    return f"{run.recipe or 'run'}: {run.name}"


def content(run: RunRecord) -> list[Block]:
    """All blocks in reading order: results first, then how they came about."""
    parts = (
        _summary,
        _figures,
        _results,
        problems,
        needles,
        by_layer,
        caches,
        gates,
        _samples,
        _graph,
        _estimates,
        _stages,
        _inputs,
        _deviations,
        _environment,
        _reproduce,
        limits,
    )
    return [Heading(title(run), 1), *(block for part in parts for block in part(run))]


def _summary(run: RunRecord) -> Iterator[Block]:
    if run.description:
        yield Text(run.description)
    for stage in run.stages:
        if stage.status in ("failed", "stopped"):
            yield Notice(f"Stage {stage.name} {stage.status}: {stage.message}")
    for stage in run.stages:
        if adopted := (stage.manifest or {}).get("adopted"):
            yield Notice(f"Stage {stage.name} was not computed: its result was adopted from {adopted['from']}.")
    waiting = [stage.name for stage in run.stages if stage.status in ("pending", "running")]
    if waiting:
        yield Notice(f"This run is not complete. Without a result so far: {', '.join(waiting)}.")
    if invented := _random_models(run):
        yield Notice(
            f"{', '.join(invented)}: random weights. This run shows that the pipeline works; its figures say nothing "
            "about the method."
        )
    if sentence := _headline(run):
        yield Text(sentence)


def _random_models(run: RunRecord) -> list[str]:
    return [
        facts.model_label(run, stage.name)
        for stage in run.stages
        if stage.type == facts.MODEL_SOURCE
        for _, meta in stage.outputs("model")
        if (meta.get("extra") or {}).get("source") == "random"
    ]


def _headline(run: RunRecord) -> str:
    rows = facts.rows(run)
    if len(rows) < 2:
        return ""
    first, last = rows[0], rows[-1]
    steps = ", ".join(f"{significant(row.values['perplexity'])} ({row.label})" for row in rows)
    name = f" of {first.model_label}" if first.model_label else ""
    sentences = [f"Held-out perplexity{name}: {steps}."]
    for recovery in list(facts.recoveries(run))[-1:]:
        sentences.append(
            f"{percent(recovery.perplexity)} of the gap that was there {recovery.reference.label} is closed "
            f"{recovery.row.label} ({percent(recovery.nll)} in log-likelihood)."
        )
    before, after = (row.values.get("kv_bytes_per_token_measured") for row in (first, last))
    # Evaluations may differ in precision, and with it in what an element takes.
    if before and after and first.values.get("precision") == last.values.get("precision"):
        sentences.append(
            f"KV cache per token in {last.values.get('precision')}: {whole(before)} B to {whole(after)} B "
            f"({percent(after / before)}), {_agreement(rows)}.{beside_growth(last.values)}"
        )
    return " ".join(sentences)


def _agreement(rows: list[Row]) -> str:
    pairs = [(r.values.get("kv_bytes_per_token_predicted"), r.values.get("kv_bytes_per_token_measured")) for r in rows]
    pairs += [
        (r.values["kv_constant_bytes_predicted"], r.values.get("kv_constant_bytes"))
        for r in rows
        if "kv_constant_bytes_predicted" in r.values
    ]
    if all(predicted == measured for predicted, measured in pairs):
        return "measured on the live cache and equal to the prediction to the byte"
    if any(predicted is None for predicted, _ in pairs):
        return "measured on the live cache"
    return "measured on the live cache; the prediction differs, see the table"


def _figures(run: RunRecord) -> Iterator[Block]:
    rows = facts.rows(run)
    if rows:
        yield Figure(
            plots.quality_and_cache(rows),
            "Held-out perplexity with 95 % intervals over documents, and KV cache bytes per token, of "
            + ", ".join(row.label for row in rows)
            + ".",
        )
    panels, captions = [], []
    histories = [(stage.name, stage.history) for stage in run.stages if stage.history]
    if histories:
        panels += plots.training_curves(histories)
        captions.append(f"Training log of {', '.join(name for name, _ in histories)}.")
    if any("baseline_perplexity" in document for row in rows for document in row.documents):
        panels += plots.documents(rows)
        captions.append("Perplexity of each held-out document against the source: on the dashed line nothing was lost.")
    if panels:
        yield Figure(panels, " ".join(captions))
    for stage, layers in facts.conversions(run):
        yield Figure(
            plots.conversion_layers(stage.name, layers), f"What the conversion in {stage.name} kept of each layer."
        )


Column = tuple[str, Callable[[Row], str]]


def _results(run: RunRecord) -> Iterator[Block]:
    rows = facts.rows(run)
    if not rows:
        return
    shares = {id_of(r.row): f"{percent(r.perplexity)} ({percent(r.nll)})" for r in facts.recoveries(run)}
    columns: list[Column] = [
        ("perplexity (95 % interval)", lambda row: with_interval(row.values, "perplexity")),
        ("gap recovered (in nll)", lambda row: shares.get(id_of(row), NONE)),
        ("KL to source, nats/token", lambda row: with_interval(row.values, "kl")),
        ("top-1 agreement", lambda row: percent(row.values.get("top1_agreement"))),
        ("bits/byte", lambda row: significant(row.values.get("bits_per_byte"))),
        ("KV B/token predicted", lambda row: whole(row.values.get("kv_bytes_per_token_predicted"))),
        ("KV B/token measured", lambda row: whole(row.values.get("kv_bytes_per_token_measured"))),
        ("prefill tokens/s", lambda row: significant(row.timing.get("prefill_tokens_per_second"), 3)),
        ("decode tokens/s", lambda row: significant(row.timing.get("decode_tokens_per_second"), 3)),
        ("parameters", lambda row: whole(row.values.get("parameters"))),
        ("peak memory", _peak_memory),
        ("data SHA-256", lambda row: str(row.values.get("data_sha256", NONE))[:12]),
    ]
    yield Heading("Results")
    yield Table(
        ["model", *(name for name, _ in columns)],
        [[_row_name(row), *(cell(row) for _, cell in columns)] for row in rows],
    )
    yield Bullets([*_conditions(rows), *_definitions(rows)])


def id_of(row: Row) -> tuple[str, str]:
    return row.label, row.measured_by


def _row_name(row: Row) -> str:
    return f"{row.label} ({row.model_label})" if row.model_label else row.label


def _peak_memory(row: Row) -> str:
    if peak := row.timing.get("inference_peak_bytes"):
        return byte_size(peak)
    peak = row.timing.get("process_peak_bytes")
    return NONE if peak is None or row.is_source else byte_size(peak)


def _conditions(rows: list[Row]) -> Iterator[str]:
    seen = set()
    for row in rows:
        values, timing = row.values, row.timing
        machine = timing.get("device_name") or f"{timing.get('device', 'cpu')}, {timing.get('threads', '?')} threads"
        speed = (
            f"speed: {timing['batch_size']} x {timing['prefill_tokens']} tokens of prompt, then "
            f"{timing['decode_tokens']} decoded one by one, median, on {machine}"
            if "prefill_tokens_per_second" in timing
            else "speed not measured"
        )
        line = (
            f"{values.get('documents')} documents, {whole(values.get('tokens'))} scored tokens in windows of at most "
            f"{values.get('window_tokens')}, {values.get('precision')}; {speed}."
        )
        if line not in seen:
            seen.add(line)
            yield line


def _definitions(rows: list[Row]) -> Iterator[str]:
    yield "Intervals: 95 %, documents drawn with replacement (seeded bootstrap)."
    if any("kl" in row.values for row in rows):
        yield (
            "KL: mean over tokens of KL(source ‖ model). Top-1 agreement: share of tokens for which both models' most "
            "likely next token is the same."
        )
    if any(row.compared_with for row in rows):
        yield (
            "Gap recovered: 1 - (value - source) / (value of the first compared model - source); in "
            "brackets the same for nll, nats per token."
        )
    yield "KV bytes: of one token of one sequence; measured = growth of the live cache between two prompt lengths."
    if any("process_peak_bytes" in row.timing and "inference_peak_bytes" not in row.timing for row in rows):
        yield "Peak memory: of the whole evaluation process, which holds the model and its baseline at once."
    digests = sorted({str(row.values["data_sha256"]) for row in rows if "data_sha256" in row.values})
    yield f"Held-out data, SHA-256 in full: {', '.join(digests)}."


def _samples(run: RunRecord) -> Iterator[Block]:
    answers: dict[str, dict[str, str]] = {}
    labels: list[str] = []
    for evaluation in facts.evaluations(run):
        inputs = evaluation.stage.inputs
        for role in ("baseline", "model"):
            if role not in inputs:
                continue
            label = facts.model_label(run, inputs[role]["stage"])
            for sample in evaluation.samples:
                if role in sample:
                    answers.setdefault(sample["prompt"], {}).setdefault(label, sample[role])
                    labels += [] if label in labels else [label]
    if answers:
        yield Heading("Sample answers")
        yield Text("Greedy decoding of the same prompts; nothing is selected.")
        for prompt, texts in answers.items():
            yield Sample(prompt, [(label, texts[label] or "(nothing)") for label in labels if label in texts])


def _graph(run: RunRecord) -> Iterator[Block]:
    yield Heading("Stages")
    yield Graph(
        [
            Node(s.name, s.type, s.status, [(name, source["stage"]) for name, source in s.inputs.items()])
            for s in run.stages
        ]
    )


def _estimates(run: RunRecord) -> Iterator[Block]:
    comparisons = facts.estimates(run)
    if not comparisons:
        return

    def show(value: float | None, unit: str) -> str:
        return (byte_size(value) if value >= 10 * 2**20 else f"{whole(value)} B") if unit and value else whole(value)

    yield Heading("The plan's estimate and what was measured")
    yield Table(
        ["stage", "quantity", "estimated", "measured", "measured / estimated"],
        [
            [
                item.stage,
                item.quantity,
                show(item.estimated, item.unit),
                show(item.measured, item.unit),
                f"{item.measured / item.estimated:.2f}" if item.estimated and item.measured else NONE,
            ]
            for item in comparisons
        ],
    )


def _stages(run: RunRecord) -> Iterator[Block]:
    yield Heading("What each stage did")
    rows = []
    for stage in run.stages:
        manifest = stage.manifest or {}
        rows.append(
            [
                stage.name,
                stage.type,
                stage.status,
                duration(manifest.get("seconds")),
                str(manifest.get("attempts", NONE)),
                stage.key,
            ]
        )
    yield Table(["stage", "type", "status", "time", "attempts", "key"], rows)
    changed = [line for stage in run.stages if (line := _settings_line(stage))]
    if changed:
        yield Text("Settings that differ from the stage type's defaults:")
        yield Bullets(changed)


def _settings_line(stage: StageRecord) -> str:
    changed = facts.settings(stage)
    parts = [
        f"{name} = {_short(value)}" + ("" if default is None else f" (default {_short(default)})")
        for name, value, default in changed
    ]
    return f"{stage.name}: {'; '.join(parts)}" if parts else ""


def _short(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _inputs(run: RunRecord) -> Iterator[Block]:
    rows = [
        [
            name,
            str(data.get("name", NONE)),
            str(data.get("split", NONE)),
            whole(data.get("rows")),
            byte_size(data.get("bytes")),
            str(data.get("licence") or NONE),
            str(data.get("sha256", NONE)),
        ]
        for name, data in facts.datasets(run)
    ]
    models = [
        f"{stage.name}: {facts.model_label(run, stage.name)}"
        for stage in run.stages
        if stage.type == facts.MODEL_SOURCE and stage.manifest
    ]
    if rows or models:
        yield Heading("Inputs")
    if models:
        yield Bullets(models)
    if rows:
        yield Table(["data", "name", "split", "documents", "size", "licence", "SHA-256 of rows.jsonl"], rows)


def _deviations(run: RunRecord) -> Iterator[Block]:
    """Runs of an older posttrain have not recorded it."""
    return card_text.deviations(card.recipe(run)) if run.told else iter(())


def _environment(run: RunRecord) -> Iterator[Block]:
    groups: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.manifest:
            groups.setdefault(_environment_line(stage.manifest), []).append(stage.name)
    if groups:
        yield Heading("Environment")
        yield Bullets([f"{', '.join(names)}: {line}" for line, names in groups.items()])


def _environment_line(manifest: dict[str, Any]) -> str:
    parts = []
    for name in ("host", "engine", "git", "versions"):
        value: Any = manifest.get(name)
        if name == "git":
            value = card_text.code_line(value)
        elif isinstance(value, dict):
            value = ", ".join(
                f"{key} {_short(item)}" for key, item in sorted(value.items()) if item not in (None, "", {})
            )
        if value:
            parts.append(f"{name}: {value}")
    return "; ".join(parts)


def _reproduce(run: RunRecord) -> Iterator[Block]:
    command = shlex.join(["posttrain", "run", run.recipe, *run.overrides])
    yield Heading("To repeat it")
    yield Code(f"{command}\nposttrain report {shlex.quote(run.name)}")
    commits = sorted({str(commit) for stage in run.stages if (commit := _commit(stage))})
    at = f" Code at commit {', '.join(commits)}." if commits else ""
    yield Text(f"Seed {run.seed}.{at} The resolved recipe is in recipe.yaml beside this report.")
    if named := list(cards.files(run)):
        yield Text(f"Model cards: {', '.join(f'{cards.FOLDER}/{name}.md' for name in named)}.")


def _commit(stage: StageRecord) -> str | None:
    git = (stage.manifest or {}).get("git")
    if not isinstance(git, dict) or not git.get("commit"):
        return None
    return git["commit"] + (" with uncommitted changes" if git.get("changed") else "")
