"""Read a finished, failed or unfinished run back from its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.pipeline.events import Event
from posttrain.pipeline.progress import state_of
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.store import MANIFEST, read_artifact

Json = dict[str, Any]


@dataclass(frozen=True)
class StageRecord:
    """One stage of a run: what the run planned for it, and its manifest once it is done."""

    name: str
    type: str
    key: str
    inputs: dict[str, Json]
    status: str
    """done | failed | stopped | running | pending | gone (known by its key alone)"""
    message: str = ""
    manifest: Json | None = None
    folder: Path | None = None
    history: list[Json] = field(default_factory=list)
    """Rows of the training log: of the history artifact, or of the events while there is none."""

    @property
    def result(self) -> Json:
        return self._metrics("result")

    @property
    def timing(self) -> Json:
        return self._metrics("timing")

    def _metrics(self, part: str) -> Json:
        return ((self.manifest or {}).get("metrics") or {}).get(part) or {}

    def outputs(self, artifact_type: str) -> Iterator[tuple[Path, Json]]:
        """Folder and meta of each finished output of that artifact type."""
        if self.manifest is None or self.folder is None:
            return
        for name, output in self.manifest.get("outputs", {}).items():
            if output.get("type") == artifact_type:
                yield self.folder / name, output.get("meta") or {}

    @cached_property
    def bytes_on_disk(self) -> int:
        outputs = (self.manifest or {}).get("outputs", {}).values()
        return sum(file["size"] for output in outputs for file in output.get("files", {}).values())


@dataclass(frozen=True)
class RunRecord:
    """A run and its stages in execution order.

    Attributes:
        scale, overrides: as typed. paper: the recipe's section, None without one.
        deviations: settings that differ from the recipe without scale and overrides; None where they are not known.
        told: whether scale, overrides and paper were recorded at all.
    """

    folder: Path
    name: str
    recipe: str
    description: str
    overrides: list[str]
    seed: int
    stages: list[StageRecord]
    scale: str | None = None
    paper: Json | None = None
    deviations: list[Json] | None = None
    told: bool = True

    @property
    def status(self) -> str:
        states = {stage.status for stage in self.stages}
        return next((state for state in ("failed", "stopped", "running", "pending") if state in states), "done")

    def stage(self, name: str) -> StageRecord | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def digest(self) -> str:
        """SHA-256 of everything the report is made of: the run's facts, the manifests, and this package's code."""
        facts: list[Any] = [self.name, self.recipe, self.description, self.overrides, self.seed]
        facts += [self.scale, self.paper, self.deviations]
        facts += [[s.name, s.type, s.key, s.inputs, s.status, s.message, s.manifest, s.history] for s in self.stages]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for source in sorted(Path(__file__).parent.iterdir()):
            if source.is_file():
                digest.update(source.read_bytes())
        return digest.hexdigest()


def read_run(run_dir: Path) -> RunRecord:
    """Read `run.json`, the manifests and the events. Raises RecipeError when `run.json` or a manifest is damaged."""
    run = RunDir(run_dir)
    document = run.record()
    events = run.events()
    return RunRecord(
        folder=run_dir,
        name=document["name"],
        recipe=str(document.get("recipe", "")),
        description=document.get("description") or "",
        overrides=list(document.get("overrides") or []),
        seed=document.get("seed", 0),
        stages=[_read_stage(entry, run.outputs, events) for entry in document["stages"]],
        scale=document.get("scale"),
        paper=document.get("paper"),
        deviations=document.get("deviations"),
        told="scale" in document,
    )


def _read_stage(entry: Json, outputs_folder: Path, events: list[Event]) -> StageRecord:
    folder = outputs_folder / entry["artifact"]
    own = [event for event in events if event.get("stage") == entry["name"]]
    manifest = read_artifact(folder).manifest if (folder / MANIFEST).exists() else None
    status, message = ("done", "") if manifest else _unfinished_status(entry["name"], own)
    stage = StageRecord(
        entry["name"], entry["type"], entry["key"], entry.get("inputs") or {}, status, message, manifest, folder
    )
    stage.history.extend(_history(stage, own))
    return stage


def _unfinished_status(name: str, events: list[Event]) -> tuple[str, str]:
    state = state_of(events, [name]).stages[name]
    if state.status == "failed":
        return "failed", state.message or "no message"
    if state.status == "stopped":
        return "stopped", f"stopped at step {state.step or 0}; `posttrain resume` continues it"
    return ("running" if state.status == "running" else "pending"), ""


def _history(stage: StageRecord, events: list[Event]) -> list[Json]:
    for folder, _ in stage.outputs("history"):
        return read_lines(folder / "history.jsonl")
    if stage.manifest:
        return []
    # After a resume a step may come twice: the last one counts.
    rows = {event["step"]: event for event in events if event["event"] == "metrics" and "step" in event}
    skip = ("time", "event", "stage")
    return [{key: value for key, value in rows[step].items() if key not in skip} for step in sorted(rows)]


def read_lines(path: Path) -> list[Json]:
    """Objects of a JSON-lines file; empty when it is missing."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
