"""The card of a model as data: everything its manifests say of how it came about. What they do not say is null.

`card_text` makes Markdown of it. Equal manifests give equal cards: nothing is read from the clock or the machine. Names
of machines are left out, and of the paths in settings all but the last part; overrides stand as they were typed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from posttrain.report import facts, needle
from posttrain.report.lineage import GONE, ancestors, main_line
from posttrain.report.read import Json, RunRecord, StageRecord

FORMAT = 1
DATA_SOURCE = "data_source"
HARDWARE = ("gpu", "cpu", "cpus", "platform")
ENGINE = ("name", "device", "strategy", "ranks", "nodes", "threads")
MEASURED = (
    "perplexity",
    "perplexity_low",
    "perplexity_high",
    "nll",
    "bits_per_byte",
    "kl",
    "kl_low",
    "kl_high",
    "top1_agreement",
    "kv_bytes_per_token_measured",
    "kv_constant_bytes",
    "kv_constant_bytes_predicted",
    "cache_ratio_without_states",
    "cache_ratio_with_states",
    "parameters",
    "pass@1",
    "pass@1_low",
    "pass@1_high",
)
STATES = ("cache_state_bytes", "cache_ratio_without_states", "cache_ratio_with_states")
"""What the estimate of a model with constant states says of its cache."""
CONDITIONS = ("data_sha256", "documents", "tokens", "window_tokens", "precision")


def model_card(run: RunRecord, stage: StageRecord, output: str, certificate: Json | None = None) -> Json:
    """The card of one model artifact.

    Args:
        run: of which `stage` is a finished stage; `lineage.run_of_artifact` makes one of an artifact alone.
        certificate: of an export, which knows who can load it.
    """
    line = ancestors(run, stage)
    measured, made = stage, output
    if certificate and not _evaluations(run, stage, output):
        # An export is measured against the model it was made of; that one's evaluation is the one there is.
        role = next((one for one in stage.inputs.values() if _same_line(run, stage, one)), None)
        measured, made = (run.stage(role["stage"]) or stage, role["output"]) if role else (stage, output)
    return {
        "format": FORMAT,
        "title": title(run, stage),
        "artifact": _artifact(stage, output),
        "recipe": recipe(run),
        "first_made": _first_made(run, stage),
        "lineage": [_step(run, one) for one in line],
        "sources": [_source(one) for one in line if one.type == facts.MODEL_SOURCE],
        "data": _data(run, line),
        "evaluations": _evaluations(run, measured, made),
        "recovery": _recovery(run, measured, made),
        "certificate": certificate,
    }


def _same_line(run: RunRecord, stage: StageRecord, source: Json) -> bool:
    return source["stage"] in [one.name for one in main_line(run, stage)[-2:-1]]


def card_of_unknown(label: str, licence: str | None = None) -> Json:
    """The card of a model of which no manifest says anything."""
    source = dict.fromkeys(("hub", "revision", "asked_revision", "package", "seed", "dtype", "parameters", "external"))
    nothing = RunRecord(Path(), "", "", "", [], None, [], told=False)
    return {
        **model_card(nothing, StageRecord(label, "", "", {}, GONE), ""),
        "title": label,
        "lineage": [],
        "sources": [source | {"stage": label, "label": label, "kind": None, "licence": licence, "weights": {}}],
    }


def title(run: RunRecord, stage: StageRecord) -> str:
    """`SmolLM2-135M-Instruct → upcycle → distill`."""
    first, *made = main_line(run, stage)
    name = facts.model_label(run, first.name) if first.type == facts.MODEL_SOURCE else first.name
    return " → ".join([name, *(one.name for one in made)])


def _artifact(stage: StageRecord, output: str) -> Json:
    manifest = stage.manifest or {}
    made = (manifest.get("outputs") or {}).get(output) or {}
    meta = made.get("meta") or {}
    architecture, extra = meta.get("architecture") or {}, meta.get("extra") or {}
    return {
        "stage": stage.name,
        "type": stage.type,
        "output": output,
        "key": stage.key,
        "manifest_sha256": manifest.get("sha256"),
        "model_type": architecture.get("model_type") or extra.get("stock"),
        "dtype": extra.get("dtype"),
        "parameters": (manifest.get("estimate") or {}).get("parameters"),
        "cache_bytes_per_token_bf16": (manifest.get("estimate") or {}).get("cache_bytes_per_token"),
        **{name: (manifest.get("estimate") or {}).get(name) for name in STATES},
        "tokenizer_sha256": meta.get("tokenizer"),
        "chat_template_sha256": meta.get("chat_template"),
        "files": made.get("files") or {},
    }


def recipe(run: RunRecord) -> Json:
    """What the run was asked for."""
    return {
        "name": run.recipe or None,
        "run": run.name or None,
        "description": run.description or None,
        "scale": run.scale,
        "overrides": run.overrides if run.told or run.overrides else None,
        "seed": run.seed,
        "paper": run.paper,
        "deviations": run.deviations,
        "recorded": run.told,
    }


def _first_made(run: RunRecord, stage: StageRecord) -> Json | None:
    """The run that computed the artifact, where this one found it in the store."""
    made = (stage.manifest or {}).get("recipe") or {}
    if not made.get("run") or made["run"] == run.name:
        return None
    return {name: made.get(name) for name in ("recipe", "run", "scale", "overrides")}


def _step(run: RunRecord, stage: StageRecord) -> Json:
    manifest = stage.manifest or {}
    outputs = manifest.get("outputs") or {}
    finished = manifest.get("finished")
    when = None if finished is None else datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds")
    document = manifest.get("key_document")
    return {
        "stage": stage.name,
        "type": stage.type or None,
        "version": manifest.get("version"),
        "key": stage.key,
        "manifest_sha256": manifest.get("sha256"),
        "in_store": stage.status != GONE,
        "inputs": {role: {k: one.get(k) for k in ("stage", "output", "key")} for role, one in stage.inputs.items()},
        "outputs": {name: _output(output) for name, output in outputs.items()},
        "seed": document.get("seed", "not used") if isinstance(document, dict) else manifest.get("seed"),
        **_settings(stage),
        "result": {name: value for name, value in stage.result.items() if _is_short(value)},
        "attempts": manifest.get("attempts"),
        "seconds": manifest.get("seconds"),
        "finished": when,
        "hardware": _chosen(manifest.get("host"), HARDWARE),
        "engine": _chosen(manifest.get("engine"), ENGINE),
        "code": manifest.get("git"),
        "versions": manifest.get("versions"),
    }


def _output(output: Json) -> Json:
    files = output.get("files") or {}
    return {"type": output.get("type"), "files": len(files), "bytes": sum(one["size"] for one in files.values())}


def _chosen(value: Any, names: tuple[str, ...]) -> Json | None:
    if not isinstance(value, dict):
        return None if value is None else {"name": value}
    return {name: value[name] for name in names if value.get(name) is not None}


def _is_short(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) >= {"reason"}
    return not isinstance(value, list) or len(value) <= 64


def _settings(stage: StageRecord) -> Json:
    """What differs from the stage type's defaults, and the defaults that decide the result as well."""
    differing = {name: value for name, value, _ in facts.settings(stage) if value is not None}
    document = ((stage.manifest or {}).get("key_document") or {}).get("config") or {}
    config = (stage.manifest or {}).get("config") or {}
    defaults = {name: config.get(name, value) for name, value in document.items() if name not in differing}
    return {
        "set": {name: _shown(name, value) for name, value in differing.items() if name != "architecture"},
        "defaults": {name: value for name, value in defaults.items() if _matters(value)},
    }


def _shown(name: str, value: Any) -> Any:
    return PurePath(value).name if name.endswith("path") and isinstance(value, str) else value


def _matters(value: Any) -> bool:
    return value is not None and value != {} and value != [] and value != ""


def _source(stage: StageRecord) -> Json:
    """A source model: which, in which revision, under which licence."""
    manifest = stage.manifest or {}
    config, external = manifest.get("config") or {}, (manifest.get("key_document") or {}).get("external") or {}
    made = (manifest.get("outputs") or {}).get("model") or {}
    extra = (made.get("meta") or {}).get("extra") or {}
    kind = extra.get("source")
    package = config.get("package") or {}
    hub = config.get("hub") if kind == "hub" else None
    return {
        "stage": stage.name,
        "label": extra.get("label"),
        "kind": kind,
        "hub": hub,
        "revision": stage.result.get("revision") if hub else None,
        "asked_revision": config.get("revision") if hub else None,
        "package": {k: package.get(k) for k in ("distribution", "version", "sha256")} if kind == "package" else None,
        "seed": config.get("seed") if kind == "random" else None,
        "licence": extra.get("licence"),
        "dtype": extra.get("dtype"),
        "parameters": stage.result.get("parameters"),
        "weights": {
            name: entry["sha256"]
            for name, entry in (made.get("files") or {}).items()
            if name.endswith(".safetensors") and "sha256" in entry
        },
        "external": external or None,
    }


def _data(run: RunRecord, line: list[StageRecord]) -> list[Json]:
    """Every data set that a stage of the line took in."""
    used: dict[tuple[str, str], list[str]] = {}
    for stage in line:
        for role, one in stage.inputs.items():
            parent = run.stage(one["stage"])
            types = (parent.manifest or {}).get("outputs", {}) if parent else {}
            if types.get(one["output"], {}).get("type") == "dataset":
                used.setdefault((one["stage"], one["output"]), []).append(f"{stage.name} ({role})")
    found = ((run.stage(name), name, output, by) for (name, output), by in used.items())
    return [_dataset(stage, output, by) for stage, _, output, by in found if stage is not None]


def _dataset(stage: StageRecord, output: str, used_by: list[str]) -> Json:
    manifest = stage.manifest or {}
    meta = manifest["outputs"][output].get("meta") or {}
    extra, config = meta.get("extra") or {}, manifest.get("config") or {}
    document = manifest.get("key_document") or {}
    hub = (config.get("hub") or {}) if (document.get("config") or {}).get("source") == "hub" else {}
    return {
        "data": f"{stage.name}.{output}",
        "name": extra.get("label"),
        "builder": (document.get("config") or {}).get("source"),
        "hub": hub.get("name"),
        "revision": hub.get("revision"),
        "rows": meta.get("rows"),
        "tokens_estimated": meta.get("tokens"),
        "bytes": extra.get("bytes"),
        "licence": extra.get("licence") or None,
        "sha256": extra.get("sha256"),
        "written_by": [one["stage"] for one in stage.inputs.values()],
        "external": document.get("external") or None,
        "used_by": used_by,
    }


def _evaluations(run: RunRecord, stage: StageRecord, output: str) -> list[Json]:
    """The finished evaluations of this very model, beside what was measured of the baseline at the same time."""
    found = []
    for one in run.stages:
        model = one.inputs.get("model") or {}
        if not any(one.outputs("evaluation")) or (model.get("key"), model.get("output")) != (stage.key, output):
            continue
        baseline, hidden = one.inputs.get("baseline"), one.result.get("needle")
        measured = {name: one.result[name] for name in MEASURED if name in one.result}
        source = {name: one.result[f"baseline_{name}"] for name in MEASURED if f"baseline_{name}" in one.result}
        found.append(
            {
                "stage": one.name,
                "of": stage.name,
                "key": one.key,
                "manifest_sha256": (one.manifest or {}).get("sha256"),
                "conditions": {name: one.result.get(name) for name in CONDITIONS},
                "baseline": facts.model_label(run, baseline["stage"]) if baseline and source else None,
                "model": measured,
                "source": source or None,
                "needle": needle.summary(one.result) if isinstance(hidden, dict) else None,
            }
        )
    return found


def _recovery(run: RunRecord, stage: StageRecord, output: str) -> Json | None:
    """How much of the gap behind the conversion is closed, as the report has it."""
    own = {one["stage"] for one in _evaluations(run, stage, output)}
    for recovery in facts.recoveries(run):
        if recovery.row.measured_by in own:
            return {"since": recovery.reference.label, "perplexity": recovery.perplexity, "nll": recovery.nll}
    return None
