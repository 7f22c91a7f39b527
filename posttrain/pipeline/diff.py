"""What differs between two runs, stage by stage in the order of the graph, and which change came first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from posttrain.errors import RecipeError
from posttrain.pipeline.fingerprint import explain
from posttrain.pipeline.run_dir import RunDir

Json = dict[str, Any]
SAME, OWN, PARENT, ONLY_FIRST, ONLY_SECOND = "same", "changed", "parent changed", "only in first", "only in second"


@dataclass(frozen=True)
class StageDiff:
    """One stage of two runs.

    Attributes:
        status: "same", "changed" (by itself), "parent changed", "only in first" or "only in second".
        changes: what of its own differs, one line each, with what was typed for it where something was.
        parents: producers of its inputs that changed.
        files: whether equal keys came out with different files; None where that is not known.
        metrics: metric to its two values, where both runs have one.
        machine: versions, commit, host and engine that differ, one line each.
        seconds: of both, None while unfinished.
    """

    name: str
    status: str
    changes: list[str] = field(default_factory=list)
    parents: list[str] = field(default_factory=list)
    files: bool | None = None
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    machine: list[str] = field(default_factory=list)
    seconds: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class RunDiff:
    """Two runs: their names, stages in the order of the graph, and the first change, None where keys are all equal."""

    first: str
    second: str
    stages: list[StageDiff]

    @property
    def cause(self) -> StageDiff | None:
        return next((stage for stage in self.stages if stage.status not in (SAME, PARENT)), None)

    def to_json(self) -> Json:
        cause = self.cause
        return {**asdict(self), "cause": cause.name if cause is not None else None}


def compare_runs(first: RunDir, second: RunDir) -> RunDiff:
    """Compare two runs, finished or not.

    Raises:
        RecipeError: a record or manifest cannot be read.
    """
    records = first.record(), second.record()
    entries = [{entry["name"]: entry for entry in record["stages"]} for record in records]
    # The second run's order; what only the first has comes where it stood there.
    names = list(entries[1])
    for position, name in enumerate(entries[0]):
        if name not in entries[1]:
            names.insert(min(position, len(names)), name)
    typed = [list(record.get("overrides") or []) for record in records]
    stages = []
    for name in names:
        old, new = entries[0].get(name), entries[1].get(name)
        if old is None or new is None:
            stages.append(StageDiff(name, ONLY_SECOND if old is None else ONLY_FIRST))
            continue
        manifests = _manifest(first, name), _manifest(second, name)
        stages.append(_compare(name, old, new, manifests, typed))
    return RunDiff(first.name, second.name, stages)


def _manifest(run: RunDir, stage: str) -> Json | None:
    artifact = run.artifact(stage)
    return artifact.manifest if artifact is not None else None


def _compare(
    name: str, old: Json, new: Json, manifests: tuple[Json | None, Json | None], typed: list[list[str]]
) -> StageDiff:
    producers = {key: one["stage"] for key, one in (new.get("inputs") or {}).items()}
    documents = old.get("key_document"), new.get("key_document")
    if documents[0] is None or documents[1] is None:
        raise RecipeError(f"stage {name} has no key document in run.json", fix="start the run again")
    own = explain({**documents[0], "inputs": _places(documents[0])}, {**documents[1], "inputs": _places(documents[1])})
    pairs = documents[0].get("inputs") or {}, documents[1].get("inputs") or {}
    parents = [producers.get(key, key) for key in pairs[1] if key in pairs[0] and pairs[0][key] != pairs[1][key]]
    status = SAME if old["key"] == new["key"] else OWN if own else PARENT
    made = [manifest for manifest in manifests if manifest is not None]
    return StageDiff(
        name,
        status,
        [f"{line}{_because(name, line, typed)}" for line in own],
        list(dict.fromkeys(parents)),
        _files(made[0]) != _files(made[1]) if status == SAME and len(made) == 2 else None,
        dict(_metrics(*made)) if len(made) == 2 else {},
        list(_machine(*made)) if len(made) == 2 else [],
        tuple(manifest["seconds"] if manifest is not None else None for manifest in manifests),  # type: ignore[arg-type]
    )


def _places(document: Mapping[str, Any]) -> Json:
    """Inputs without their producers' keys, so that a changed parent is no change of the stage's own."""
    return {name: {**one, "key": ""} for name, one in (document.get("inputs") or {}).items()}


def _because(stage: str, line: str, typed: list[list[str]]) -> str:
    """The overrides behind a change: what one run was given and the other was not."""
    key = line.partition(" ")[0]
    names = (f"stages.{stage}.{key}", f"{stage}.{key}", key)
    found = []
    for run, overrides in zip(("first", "second"), typed, strict=True):
        found += [f"{run}: {text}" for text in overrides if text.lstrip("+").partition("=")[0] in names]
    if not found:
        scales = [next((text for text in overrides if text.startswith("scale=")), "no scale") for overrides in typed]
        return f"  ({scales[0]}; {scales[1]})" if scales[0] != scales[1] else ""
    return f"  ({'; '.join(found)})"


def _files(manifest: Json) -> Json:
    return {name: output["files"] for name, output in manifest["outputs"].items()}


def _metrics(old: Json, new: Json) -> Iterator[tuple[str, tuple[float, float]]]:
    results = [manifest["metrics"]["result"] for manifest in (old, new)]
    for name in results[0]:
        values = [result.get(name) for result in results]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            if all(math.isfinite(value) for value in values):
                yield name, (values[0], values[1])


def _machine(old: Json, new: Json) -> Iterator[str]:
    def lines(section: str, names: Iterator[str] | list[str]) -> Iterator[str]:
        one, other = (manifest.get(section) or {} for manifest in (old, new))
        for name in names or sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                yield f"{name} {one.get(name)} → {other.get(name)}"

    yield from lines("versions", [])
    commits = [(manifest.get("git") or {}).get("commit") for manifest in (old, new)]
    if commits[0] != commits[1]:
        yield f"commit {_short(commits[0])} → {_short(commits[1])}"
    yield from lines("host", ["name", "gpu", "cpu"])
    yield from lines("engine", ["device", "ranks", "nodes", "strategy"])


def _short(commit: str | None) -> str:
    return commit[:12] if commit else "none"
