"""What a stage that was run again means for the stages after it: their keys are the same, their inputs may not be."""

from __future__ import annotations

from typing import Any

from posttrain.errors import RecipeError
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.stage_runner import discard_work
from posttrain.pipeline.store import MANIFEST, Store, read_artifact

Files = dict[str, Any]
"""Output name to the digests of its files."""


def files_before(store: Store, type_: str, key: str) -> Files | None:
    """The outputs under that key, in place or set aside by a rerun that did not end; None without readable ones."""
    for folder in (store.folder(type_, key), store.aside(type_, key)):
        if (folder / MANIFEST).exists():
            try:
                return files_of(read_artifact(folder).manifest)
            except RecipeError:
                return None
    return None


def files_of(manifest: dict[str, Any]) -> Files:
    """The digests of an artifact's files by output."""
    return {name: output["files"] for name, output in manifest["outputs"].items()}


def retire_descendants(plan: Plan, name: str, before: Files, after: Files) -> list[StagePlan]:
    """Take away what was made from the outputs of stage `name` that are no longer the same.

    Returns the stages that lost an artifact or unfinished work; they are pending again.
    """
    outputs = {output for output in before.keys() | after.keys() if before.get(output) != after.get(output)}
    affected: set[str] = set()
    lost = []
    for planned in plan.stages:
        inputs = planned.inputs.values()
        if any(one.stage in affected or (one.stage == name and one.output in outputs) for one in inputs):
            affected.add(planned.name)
            if _retire(plan.store, planned):
                lost.append(planned)
    return lost


def _retire(store: Store, planned: StagePlan) -> bool:
    type_, key = planned.stage.type, planned.key
    work_dir = store.work_dir(type_, key)
    worked = work_dir.exists()
    if worked:
        worked = discard_work(work_dir)
    retired = store.retire(type_, key)
    planned.status, planned.artifact, planned.resumes = "pending", None, False
    return retired or worked
