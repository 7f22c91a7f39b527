"""The card of a model as Markdown, and the head that the Hugging Face hub reads. Unknown values are called unknown."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from posttrain.report import markdown, needle
from posttrain.report.blocks import Block, Bullets, Code, Heading, Notice, Table, Text
from posttrain.report.caches import measured_states, planned_states
from posttrain.report.numbers import NONE, byte_size, duration, percent, significant, whole, with_interval
from posttrain.report.read import Json

UNKNOWN = "unknown"
LICENCES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc0-1.0",
    "gemma",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "openrail",
}
"""As the hub spells them; it wants `other` and a name for the rest."""
NOT_SERVED = "vLLM, SGLang, TGI and llama.cpp cannot load it: its architecture is not among theirs"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def render(card: Json) -> str:
    """The card as Markdown, without the hub's head."""
    parts = (
        _head,
        _loading,
        _export,
        _evaluation,
        _lineage,
        _sources,
        _data,
        _how,
        _settings,
        lambda card: deviations(card["recipe"]) if card["lineage"] else iter(()),
        _machines,
        _code,
        _files,
    )
    return markdown.render([block for part in parts for block in part(card)])


def hub_head(card: Json) -> str:
    """YAML between two lines of dashes: only what is known, so that nobody is sent to a wrong base model."""
    import yaml

    sources, data = card["sources"], card["data"]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if hubs := list(dict.fromkeys(one["hub"] for one in sources if one["hub"])):
        head["base_model"] = hubs[0] if len(hubs) == 1 else hubs
    licences = list(dict.fromkeys(one["licence"] for one in sources))
    if len(licences) == 1 and licences[0]:
        name = licences[0].lower()
        head |= {"license": name} if name in LICENCES else {"license": "other", "license_name": licences[0]}
    if names := list(dict.fromkeys(one["hub"] for one in data if one["hub"])):
        head["datasets"] = names
    steps = [one["type"] for one in card["lineage"] if one["type"] and not one["type"].endswith("_source")]
    tags = ["posttrain", card["recipe"]["name"], card["artifact"]["model_type"], *steps]
    head["tags"] = list(dict.fromkeys(tag for tag in tags if tag))
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"


def _known(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _count(value: Any) -> str:
    return UNKNOWN if value is None else whole(value)


def _short(value: Any, limit: int = 400) -> str:
    text = _known(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _head(card: Json) -> Iterator[Block]:
    yield Heading(card["title"], 1)
    if card["recipe"]["description"]:
        yield Text(card["recipe"]["description"])
    for source in card["sources"]:
        if source["kind"] == "random":
            yield Notice(
                f"{source['label'] or source['stage']}: random weights. Its figures say nothing about a method."
            )
    for step in card["lineage"]:
        if not step["in_store"]:
            yield Notice(f"{step['stage']} is no longer in the store: what it was made of is unknown.")
        elif step["result"].get("kept") == "input":
            reason = (step["result"].get("gate") or {}).get("reason")
            yield Notice(f"{step['stage']} has passed on its input model, unchanged: {_known(reason)}.")
    if dirty := [step["stage"] for step in card["lineage"] if (step["code"] or {}).get("changed")]:
        yield Notice(f"Made by code with uncommitted changes: {', '.join(dirty)}. See Code and versions.")
    if not card["lineage"]:
        yield Notice("Not made by posttrain, or moved out of its store: where it comes from is unknown.")
    artifact = card["artifact"]
    yield Bullets(
        [
            f"Architecture: {_known(artifact['model_type'])}, stored in {_known(artifact['dtype'])}",
            f"Parameters: {_count(artifact['parameters'])} (by formula)",
            f"KV cache: {_count(artifact['cache_bytes_per_token_bf16'])} bytes per token in bf16"
            f"{planned_states(artifact)} (by formula)",
            f"Licence of the model it was made from: {_licences(card)}",
        ]
    )


def _licences(card: Json) -> str:
    found = list(dict.fromkeys(_known(one["licence"]) for one in card["sources"] if one["kind"] != "random"))
    if not found:
        return "there is none, its weights are random" if card["sources"] else UNKNOWN
    return ", ".join(found)


def _loading(card: Json) -> Iterator[Block]:
    yield Heading("How to load it")
    certificate, model_type = card["certificate"], card["artifact"]["model_type"]
    plain = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )
    ours = 'import posttrain\nmodel, tokenizer = posttrain.load("FOLDER")'
    if certificate and certificate.get("to") != "native":
        if certificate.get("loader") == "transformers":
            yield Code(plain, "python")
        lines = [
            f"Written for {_known(certificate.get('loader'))} as {_known(certificate.get('class'))}, no custom code"
        ]
        lines.append(f"Servers: {_known(certificate.get('servers'))}")
        yield Bullets([*lines, *(f"Caveat: {text}" for text in (certificate.get("caveats") or {}).values())])
    elif model_type == "upcycled":
        yield Code(ours, "python")
        own = plain.replace('("FOLDER")', '("FOLDER", trust_remote_code=True)')
        yield Code(f"# Without posttrain: the folder brings its modelling code along.\n{own}", "python")
        stock = "posttrain export --to deepseek_v3 (latent attention everywhere) or --to falcon_h1 (states and full "
        yield Bullets([NOT_SERVED, f"{stock}attention) writes stock classes where that is exact"])
    elif model_type in PLAIN:
        yield Code(ours, "python")
        yield Code(plain, "python")
        yield Bullets([f"A plain {model_type}: whatever knows that class can load it; only transformers was tried"])
    else:
        yield Text(f"{UNKNOWN}: the manifest does not name its architecture.")


def _export(card: Json) -> Iterator[Block]:
    certificate = card["certificate"]
    if not certificate:
        return
    yield Heading("Export")
    given = {name: certificate.get(name) for name in ("to", "loader", "class", "dtype", "norm_scale_bits")}
    lines = [_listed({name: value for name, value in given.items() if value is not None})]
    for step in certificate.get("steps") or []:
        kind = "a condition" if step.get("exact") else "no condition"
        lines.append(f"{step['name']}: relative logit error {significant(step['relative'], 2)}, {kind}")
    cache, constant = certificate.get("cache_bytes_per_token") or {}, certificate.get("cache_state_bytes") or {}
    lines.append(f"KV cache per token: {_held(cache)}")
    if constant.get("predicted"):
        lines.append(f"States and convolution columns per sequence: {_held(constant)}")
    if certificate.get("perplexity") is not None:
        of = certificate.get("perplexity_of")
        lines.append(f"Perplexity {significant(certificate['perplexity'])} ({_known(of)})")
    yield Bullets([*lines, "all of it is in certificate.json"])


def _held(held: Json) -> str:
    """Bytes of the export's cache, and of the model's where it is another."""
    own = held.get("model")
    before = f", {_count(own)} B before the export" if own not in (None, held.get("predicted")) else ""
    return f"{_count(held.get('predicted'))} B predicted, {_count(held.get('measured'))} measured{before}"


def _evaluation(card: Json) -> Iterator[Block]:
    yield Heading("Evaluation against the model it started from")
    if not card["evaluations"]:
        yield Text("None: no finished stage has evaluated this model.")
        return
    rows, notes = [], []
    if (of := card["evaluations"][0]["of"]) != card["artifact"]["stage"]:
        yield Text(f"Of the model after {of}, which this one was exported from:")
    elif card["certificate"]:
        yield Text("Of the model before its export:")
    solved = any("pass@1" in one["model"] for one in card["evaluations"])
    for one in card["evaluations"]:
        for label, values in ((one["baseline"], one["source"]), (f"after {one['of']}", one["model"])):
            if values:
                passed = [with_interval(values, "pass@1")] if solved else []
                rows.append([f"{label} ({one['stage']})", *_figures(values), *passed])
        at = one["conditions"]
        notes.append(
            f"{one['stage']}: {_count(at['documents'])} held-out documents, {_count(at['tokens'])} scored tokens, "
            f"windows of at most {_count(at['window_tokens'])}, {_known(at['precision'])}, data SHA-256 "
            f"{_known(at['data_sha256'])}"
        )
        notes += measured_states(one["stage"], one["model"])
        if one["source"] is None:
            notes.append(f"{one['stage']} had no baseline: how it compares with the model it started from is unknown")
        if one["needle"]:
            notes += [f"{one['stage']}: {line}" for line in needle.sentences(one["needle"], one["baseline"])]
    header = [
        "model",
        "perplexity (95 %)",
        "nats/token",
        "bits/byte",
        "KL to source (95 %)",
        "top-1 agreement",
        "KV B/token",
        *(["pass@1 (95 %)"] if solved else []),
    ]
    yield Table(header, rows)
    if recovery := card["recovery"]:
        notes.append(
            f"{percent(recovery['perplexity'])} of the perplexity gap that was there {recovery['since']} is closed "
            f"({percent(recovery['nll'])} in log-likelihood)"
        )
    yield Bullets(notes)


def _figures(values: Json) -> list[str]:
    return [
        with_interval(values, "perplexity"),
        significant(values.get("nll")),
        significant(values.get("bits_per_byte")),
        with_interval(values, "kl"),
        percent(values.get("top1_agreement")),
        whole(values.get("kv_bytes_per_token_measured")),
    ]


def _lineage(card: Json) -> Iterator[Block]:
    if not card["lineage"]:
        return
    yield Heading("Where it comes from")
    rows = []
    for step in card["lineage"]:
        inputs = [f"{one['stage']}.{one['output']} as {role}" for role, one in step["inputs"].items()]
        version = f" (version {step['version']})" if step["version"] is not None else ""
        rows.append(
            [
                step["stage"],
                f"{_known(step['type'])}{version}",
                ", ".join(inputs) or (NONE if step["in_store"] else UNKNOWN),
                step["key"],
                _known(step["manifest_sha256"]),
            ]
        )
    yield Table(["stage", "type", "made from", "key", "SHA-256 of its manifest"], rows)
    yield Text("A manifest holds the SHA-256 of every file of its artifact; posttrain verify checks both.")


def _sources(card: Json) -> Iterator[Block]:
    if not card["sources"]:
        return
    yield Heading("Source models")
    for one in card["sources"]:
        lines = [f"From: {_origin(one)}"]
        if one["kind"] == "hub":
            pinned = (
                "" if one["asked_revision"] == one["revision"] else f" (asked for: {_known(one['asked_revision'])})"
            )
            lines.append(f"Revision: {_known(one['revision'])}{pinned}")
        lines.append(f"Licence: {_known(one['licence']) if one['kind'] != 'random' else 'none, random weights'}")
        lines.append(f"Parameters: {_count(one['parameters'])}; stored in {_known(one['dtype'])}")
        lines += [f"{name}: SHA-256 {sha256}" for name, sha256 in one["weights"].items()]
        yield Text(f"{one['stage']}: {_known(one['label'])}")
        yield Bullets(lines)


def _origin(source: Json) -> str:
    if source["kind"] == "hub":
        return f"Hugging Face hub, {_known(source['hub'])}"
    if source["kind"] == "package":
        package = source["package"]
        said = f"{_known(package['distribution'])} {_known(package['version'])}"
        return f"Python package {said}, a GGUF file of SHA-256 {_known(package['sha256'])}, dequantised"
    if source["kind"] == "path":
        return "a local folder, known by the SHA-256 of its files"
    return f"random weights of seed {_known(source['seed'])}" if source["kind"] == "random" else UNKNOWN


def _data(card: Json) -> Iterator[Block]:
    if not card["lineage"]:
        return
    yield Heading("Data")
    if not card["data"]:
        yield Text("No stage on the way has taken in a data set.")
        return
    rows = []
    for one in card["data"]:
        revision = f", revision {_known(one['revision'])}" if one["hub"] else ""
        written = f", written by {', '.join(one['written_by'])}" if one["written_by"] else ""
        rows.append(
            [
                one["data"],
                f"{_known(one['name'])} ({_known(one['builder'])}{revision}{written})",
                _count(one["rows"]),
                _count(one["tokens_estimated"]),
                UNKNOWN if one["bytes"] is None else byte_size(one["bytes"]),
                _known(one["licence"]),
                _known(one["sha256"]),
                ", ".join(one["used_by"]),
            ]
        )
    header = ["data", "name", "rows", "tokens (estimate)", "size", "licence", "SHA-256 of rows.jsonl", "used by"]
    yield Table(header, rows)
    outside = [f"{one['data']}: {_short(one['external'])}" for one in card["data"] if one["external"]]
    if outside:
        yield Text("What of it lies outside the recipe, by digest or version:")
        yield Bullets(outside)


def _how(card: Json) -> Iterator[Block]:
    recipe = card["recipe"]
    if not card["lineage"]:
        return
    yield Heading("How it was made")
    if recipe["name"] is None or recipe["overrides"] is None:
        yield Text(f"Recipe {_known(recipe['name'])}; scale and overrides are {UNKNOWN}: they were not recorded.")
    else:
        yield Code(shlex.join(["posttrain", "run", recipe["name"], *recipe["overrides"]]))
    scale = (recipe["scale"] or "none, the recipe's full scale") if recipe["recorded"] else UNKNOWN
    yield Bullets([f"Scale: {scale}", f"Run: {_known(recipe['run'])}", f"Seed: {_known(recipe['seed'])}"])
    if made := card["first_made"]:
        typed = shlex.join(["posttrain", "run", _known(made["recipe"]), *(made["overrides"] or [])])
        yield Text(f"This run found the artifact in the store. Run {made['run']} had computed it:")
        yield Code(typed)


def _settings(card: Json) -> Iterator[Block]:
    if not card["lineage"]:
        return
    yield Heading("Settings")
    for step in card["lineage"]:
        if not step["in_store"]:
            continue
        yield Text(f"{step['stage']} ({_known(step['type'])}), seed {_known(step['seed'])}:")
        lines = [f"set: {_listed(step['set'])}", f"defaults: {_listed(step['defaults'])}"]
        if step["result"]:
            lines.append(f"result: {_listed(step['result'])}")
        yield Bullets(lines)


def _listed(values: Json) -> str:
    return "; ".join(f"{name} = {_short(value, 200)}" for name, value in values.items()) or "none"


def deviations(recipe: Json) -> Iterator[Block]:
    """From the paper, as the recipe says, and from the recipe, as was found. `recipe` as in a card."""
    yield Heading("Where it differs from the paper")
    if paper := recipe["paper"]:
        yield Text(f"The recipe follows {paper['title']} ({paper['link']}). At its own full scale it differs in this:")
        yield Bullets(paper["differs"] or ["in nothing that the recipe's authors know of"])
    else:
        follows = (
            "names no paper that it follows" if recipe["recorded"] else f"was not recorded: its paper is {UNKNOWN}"
        )
        yield Text(f"The recipe {follows}.")
    rows = recipe["deviations"]
    if rows is None:
        yield Text(f"How this run differs from the recipe at full scale is {UNKNOWN}.")
    elif not rows:
        yield Text("This run has the recipe's own settings.")
    else:
        yield Text("This run differs from the recipe, which stands above, in this:")
        cells = [[one["key"], _value(one["recipe"]), _value(one["run"]), one["because"]] for one in rows]
        yield Table(["setting", "recipe", "this run", "because of"], cells)


def _value(value: Any) -> str:
    return "null" if value is None else _short(value, 120)


def _machines(card: Json) -> Iterator[Block]:
    if not card["lineage"]:
        return
    yield Heading("Hardware and time")
    rows = [
        [
            step["stage"],
            UNKNOWN if step["seconds"] is None else duration(step["seconds"]),
            _known(step["attempts"]),
            _listed(step["hardware"]) if step["hardware"] else UNKNOWN,
            _listed(step["engine"]) if step["engine"] else UNKNOWN,
            _known(step["finished"]),
        ]
        for step in card["lineage"]
    ]
    yield Table(["stage", "time of the last attempt", "attempts", "hardware", "engine", "finished (UTC)"], rows)


def _code(card: Json) -> Iterator[Block]:
    if not card["lineage"]:
        return
    yield Heading("Code and versions")
    groups: dict[str, list[str]] = {}
    for step in card["lineage"]:
        for line in (code_line(step["code"]), f"versions: {_listed(step['versions'] or {})}"):
            groups.setdefault(line.replace("versions: none", f"versions: {UNKNOWN}"), []).append(step["stage"])
    yield Bullets([f"{', '.join(stages)}: {line}" for line, stages in groups.items()])


def code_line(code: Json | None) -> str:
    """One sentence on the code of a stage."""
    if not code:
        return f"code {UNKNOWN}"
    if code.get("commit") is None:
        said = f"posttrain {_known(code.get('version'))}, {_known(code.get('why'))}"
        return f"{said}; SHA-256 of its {_count(code.get('files'))} source files {_known(code.get('sha256'))}"
    line = f"commit {code['commit']}"
    if "changed" not in code:
        return f"{line}; whether it was changed is {UNKNOWN}"
    if not code["changed"]:
        line += ", unchanged"
    elif diff := code.get("diff"):
        kept = "kept beside the manifest as code.diff" if diff.get("kept") else "too long to be kept"
        line += f", changed: diff of {byte_size(diff['size'])}, SHA-256 {diff['sha256']}, {kept}"
    elif not code.get("untracked"):
        line += f", changed; how is {UNKNOWN}"
    if untracked := code.get("untracked"):
        line += "; not in git: " + ", ".join(f"{one['path']} (SHA-256 {_known(one['sha256'])})" for one in untracked)
    return line + ("; the code was changed while the stage ran" if code.get("changed_meanwhile") else "")


def _files(card: Json) -> Iterator[Block]:
    files = card["artifact"]["files"]
    if files:
        yield Heading("Files")
        rows = [
            [name, UNKNOWN if one["size"] is None else byte_size(one["size"]), one["sha256"]]
            for name, one in sorted(files.items())
        ]
        yield Table(["file", "size", "SHA-256"], rows)
