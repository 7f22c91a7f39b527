"""Where a model comes from: the stages before it, in a run or followed from key to key through the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.pipeline.store import MANIFEST, read_artifact
from posttrain.report.read import Json, RunRecord, StageRecord

GONE = "gone"
"""Status of a stage of which only its key is known: its artifact is no longer in the store."""


def ancestors(run: RunRecord, stage: StageRecord) -> list[StageRecord]:
    """The stages that a stage was made from, each after its own, in the order of inputs; itself is the last."""
    found: dict[str, StageRecord] = {}

    def add(one: StageRecord) -> None:
        for source in one.inputs.values():
            parent = run.stage(source["stage"])
            if parent is not None and parent.name not in found:
                add(parent)
        found[one.name] = one

    add(stage)
    return list(found.values())


def main_line(run: RunRecord, stage: StageRecord) -> list[StageRecord]:
    """The models on the way from a source to what `stage` made, each the first model that the next one took in."""
    line = [stage]
    while True:
        parents = ((run.stage(one["stage"]), one["output"]) for one in line[0].inputs.values())
        models = (parent for parent, output in parents if parent is not None and _is_model(parent, output))
        parent = next(models, None)
        if parent is None:
            return line
        line.insert(0, parent)


def _is_model(stage: StageRecord, output: str) -> bool:
    outputs = (stage.manifest or {}).get("outputs", {})
    return outputs.get(output, {}).get("type") == "model" if outputs else output == "model"


def artifact_folder(path: Path) -> Path | None:
    """The artifact that a path is, or is an output of (links followed); None if it is neither."""
    real = path.expanduser().resolve()
    return next((folder for folder in (real, real.parent) if (folder / MANIFEST).is_file()), None)


def run_of_artifact(folder: Path) -> tuple[RunRecord, StageRecord]:
    """An artifact, everything it was made from and every evaluation of it in its store, as if they were one run.

    Raises:
        RecipeError: one of the manifests was changed after it was written.
    """
    walk = _Walk(folder.parents[1])
    key = walk.add(folder)
    # As in a run: made of before made from, evaluations last.
    walk.evaluations(key)
    stages = walk.records()
    manifest = walk.manifests[key]
    recipe = manifest.get("recipe") or {}
    run = RunRecord(
        folder=folder,
        name=str(recipe.get("run") or ""),
        recipe=str(recipe.get("recipe") or ""),
        description=recipe.get("description") or "",
        overrides=list(recipe.get("overrides") or []),
        seed=manifest.get("seed"),
        stages=stages,
        scale=recipe.get("scale"),
        paper=recipe.get("paper"),
        deviations=recipe.get("deviations"),
        told="overrides" in recipe,
    )
    return run, next(stage for stage in stages if stage.key == key)


class _Walk:
    """Manifests by key, parents first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifests: dict[str, Json] = {}
        self.folders: dict[str, Path] = {}
        self.references: dict[str, str] = {}

    def add(self, folder: Path) -> str:
        manifest = read_artifact(folder).manifest
        key = manifest["key"]
        if key in self.folders:
            return key
        self.folders[key] = folder
        for source in (manifest.get("inputs") or {}).values():
            self.references.setdefault(source["key"], source["reference"].removesuffix(f".{source['output']}"))
            parent = next(iter(sorted(self.root.glob(f"*/{source['key']}/{MANIFEST}"))), None)
            if parent is not None:
                self.add(parent.parent)
        self.manifests[key] = manifest
        return key

    def evaluations(self, key: str) -> None:
        for path in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if path.parent.name.startswith(".") or key not in path.read_text(encoding="utf-8"):
                continue
            try:
                manifest = read_artifact(path.parent).manifest
            except RecipeError:
                continue
            types = {output.get("type") for output in manifest.get("outputs", {}).values()}
            if "evaluation" in types and ((manifest.get("inputs") or {}).get("model") or {}).get("key") == key:
                self.add(path.parent)

    def records(self) -> list[StageRecord]:
        names: dict[str, str] = {}
        taken: set[str] = set()
        lost = sorted(set(self.references) - set(self.manifests))
        for key in [*self.manifests, *lost]:
            name = self.manifests[key]["stage"] if key in self.manifests else self.references[key]
            names[key] = name if name not in taken else f"{name} ({key[:8]})"
            taken.add(name)
        gone = [StageRecord(names[key], "", key, {}, GONE) for key in lost]
        return [*gone, *(self._record(key, manifest, names) for key, manifest in self.manifests.items())]

    def _record(self, key: str, manifest: Json, names: dict[str, str]) -> StageRecord:
        inputs: dict[str, Any] = {
            role: {**source, "stage": names[source["key"]]} for role, source in (manifest.get("inputs") or {}).items()
        }
        return StageRecord(
            names[key], manifest["type"], key, inputs, "done", manifest=manifest, folder=self.folders[key]
        )
