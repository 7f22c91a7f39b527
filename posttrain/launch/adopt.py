"""Accept a hand-made artifact as the result of a stage: checked, copied and sealed as if the stage had made it.

Its manifest says `adopted`: from where, when and by whom. Nothing is computed and nothing of torch is needed.
"""

from __future__ import annotations

import getpass
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import Problem, RecipeError, StageError
from posttrain.launch.execute import Computed, host_facts, make_manifest, measure
from posttrain.launch.job import CLAIM, LOCK, Job
from posttrain.launch.source_code import source_code
from posttrain.models.finite import first_non_finite
from posttrain.pipeline.files import clear, discard_tree, list_files, write_text
from posttrain.pipeline.graph import in_section
from posttrain.pipeline.lock import Lock, LockHeld
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.rerun import files_before, files_of, retire_descendants
from posttrain.pipeline.store import REQUIRED_FILES, Artifact, publish, seal

MAY_BE_MADE_UP = {"history": {"history.jsonl": ""}}
"""Artifact type to the files of one that says nothing: a model made by hand has no training log."""


def adopt(plan: Plan, name: str, folder: Path, *, force: bool = False) -> Artifact:
    """Publish a folder as the artifact of a planned stage.

    Args:
        folder: holds a folder for each output of the stage, or is itself the first output.
        force: take the place of an artifact that is there; it is set aside until the new one is in place.

    Raises:
        RecipeError: no such stage, an input that is not in the store, an artifact that is there already, or a folder
            that is not what the stage promises: missing files, links, another structure than planned, numbers that
            are none.
    """
    planned = _planned(plan, name)
    store, type_, key = plan.store, planned.stage.type, planned.key
    if (store.folder(type_, key) / "manifest.json").exists() and not force:
        what = f"stage {name} has an artifact already"
        raise RecipeError(what, str(store.folder(type_, key)), "--force puts this one in its place")
    if plan.outputs.resolve().is_relative_to(folder.resolve()):
        what = f"{folder} holds the outputs folder {plan.outputs}, so it cannot be copied into it"
        raise RecipeError(what, str(folder), "move the model to a folder of its own, or give another paths.outputs=DIR")
    given, made_up = _outputs_in(planned, folder)
    before = files_before(store, type_, key)
    job = _job(plan, planned)
    work_dir = store.work_dir(type_, key)
    try:
        with Lock.acquire(work_dir / CLAIM), Lock.acquire(work_dir / LOCK):
            if force and store.folder(type_, key).exists():
                store.set_aside(type_, key)
            try:
                artifact = _take_over(planned, job, work_dir, given, made_up, folder)
            except BaseException:
                store.restore(type_, key)
                raise
            discard_tree(work_dir)
    except LockHeld as error:
        raise RecipeError(f"stage {name} is being computed: {error}", fix="wait, or: posttrain cancel") from error
    except StageError as error:
        raise RecipeError(problems=in_section(error.problems, planned.stage, name)) from error
    if before is not None:
        # What was made from the artifact that was there is not made from this one.
        retire_descendants(plan, name, before, files_of(artifact.manifest))
    return artifact


def _planned(plan: Plan, name: str) -> StagePlan:
    from posttrain.pipeline.graph import nearest

    names = [planned.name for planned in plan.stages]
    if name not in names:
        near = nearest(name, names)
        raise RecipeError(f"the recipe has no stage `{name}`", fix=f"write {near}" if near else f"{', '.join(names)}")
    planned = plan[name]
    missing = dict.fromkeys(
        one.stage
        for one in planned.inputs.values()
        if plan[one.stage].artifact is None  # their metas decide checks
    )
    if missing:
        raise RecipeError(
            problems=[
                Problem(
                    f"stage {name} takes {parent}, which is not in the store",
                    fix=f"posttrain run {plan.resolved.recipe} … --until {parent}, or adopt that one first",
                )
                for parent in missing
            ]
        )
    return planned


def _outputs_in(planned: StagePlan, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Output name to the folder that is to become it, and outputs that are made up because nothing can be known."""
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder", fix="give the folder of the artifact")
    outputs = planned.stage.outputs
    inside = {name: folder / name for name in outputs if (folder / name).is_dir()}
    first = next(iter(outputs))
    given = inside if inside else {first: folder}
    absent = [name for name in outputs if name not in given]
    lacking = [name for name in absent if outputs[name] not in MAY_BE_MADE_UP]
    if lacking:
        named = ", ".join(f"{name} (a {outputs[name]})" for name in lacking)
        what = f"the artifact of a {planned.stage.type} stage has also {named}"
        fix = f"give a folder that holds the folders {', '.join(outputs)}"
        raise RecipeError(what, str(folder), fix)
    problems = [problem for name, path in given.items() for problem in _wrong_files(name, outputs[name], path)]
    if problems:
        raise RecipeError(problems=problems)
    return given, absent


def _wrong_files(name: str, type_: str, folder: Path) -> Iterator[Problem]:
    files = list_files(folder)
    for path in [*files.values(), *(found for found in folder.rglob("*") if found.is_dir())]:
        if path.is_symlink():
            yield Problem("an artifact may not hold links", str(path), "put the file itself there")
    for relative in REQUIRED_FILES.get(type_, ()):
        if relative not in files:
            yield Problem(f"output `{name}` is no {type_}: it has no {relative}", str(folder))
    for relative, path in files.items():
        if path.suffix == ".safetensors" and not path.is_symlink() and (tensor := first_non_finite(path)):
            yield Problem(f"tensor {tensor} has NaN or infinite numbers", str(path), "look at how it was made")
        if relative.endswith((".bin", ".pt", ".pth", ".pkl")):
            yield Problem("pickled files are not taken over", str(path), "save weights as safetensors")


def _job(plan: Plan, planned: StagePlan) -> Job:
    metas = {name: plan[one.stage].artifact.metas[one.output] for name, one in planned.inputs.items()}
    predicted = planned.stage.describe(planned.cfg, metas)
    return Job(
        stage=planned.name,
        type=planned.stage.type,
        key=planned.key,
        document=planned.document,
        config=planned.cfg.model_dump(mode="json"),
        seed=plan.resolved.frame.seed,
        inputs={
            name: {"reference": one.reference, "key": one.key, "output": one.output}
            for name, one in planned.inputs.items()
        },
        predicted={name: meta.to_json() for name, meta in predicted.items()},
        estimate=planned.to_json()["estimate"],
        target=str(plan.store.folder(planned.stage.type, planned.key)),
        events="",
        attempt=0,
    )


def _take_over(
    planned: StagePlan, job: Job, work_dir: Path, given: Mapping[str, Path], made_up: list[str], source: Path
) -> Artifact:
    started, code = time.time(), source_code()
    outputs = work_dir / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    clear(outputs)
    for name, path in given.items():
        shutil.copytree(path, outputs / name)
    for name in made_up:
        (outputs / name).mkdir()
        for file, text in MAY_BE_MADE_UP[planned.stage.outputs[name]].items():
            write_text(outputs / name / file, text)
    fix = f"adopt a model of the planned shape, or give stage {planned.name} the settings that this one was made with"
    metas = {name: measure(planned.stage, job, name, outputs / name, fix) for name in job.predicted}
    computed = Computed({}, {}, {}, "cpu", host_facts("cpu"), None)
    manifest = make_manifest(job, planned.stage, computed, metas, started, code)
    adopted: dict[str, Any] = {"from": str(source.resolve()), "by": _user(), "at": started, "made_up": made_up}
    seal(work_dir, {**manifest, "adopted": adopted}, code.diff)
    return publish(work_dir, Path(job.target))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
