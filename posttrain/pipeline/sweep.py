"""Run the points of a sweep one after the other; each is an ordinary run, and stages they share are computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    PosttrainError,
    Problem,
    RecipeError,
)
from posttrain.pipeline.files import read_json, write_json
from posttrain.pipeline.fingerprint import digest
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.runner import RunResult, check_name, check_selection, run_plan
from posttrain.pipeline.stage_runner import Display

FORMAT = 1
RECORD = "sweep.json"


@dataclass(frozen=True)
class SweepPoint:
    """One run to do: swept key to value as typed, and its plan, made anew when its turn comes."""

    values: dict[str, str]
    make: Callable[[], Plan]


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended: its folder, the exit code, the points that failed with why, and the comparing report."""

    folder: Path
    exit_code: int
    failed: list[tuple[str, str]]
    report: Path | None


def sweep_name(recipe: str, points: Sequence[Plan], name: str | None) -> str:
    """`name`, or the recipe's with 8 hexadecimal digits of what is swept."""
    return name or f"{recipe}-{digest([plan.recipe_digest for plan in points])[:8]}"


def check_sweep(plans: Sequence[Plan], *, yes: bool) -> None:
    """Hold every point against the guard, and all together against the disk.

    Raises:
        RecipeError: with what is too much, and which point it is.
    """
    from posttrain.pipeline.guard import free_disk, guard

    problems: dict[Problem, None] = {}
    needed: dict[tuple[str, str], int] = {}
    for plan in plans:
        check_selection(plan)
        check_name(plan)
        if yes or not plan.to_do:
            continue
        try:
            guard(plan)
        except RecipeError as error:
            problems |= dict.fromkeys(error.problems)
        needed |= {(one.stage.type, one.key): one.estimate.disk_bytes or 0 for one in plan.to_do}
    if problems:
        raise RecipeError(problems=list(problems))
    if needed:
        folder = plans[0].outputs
        while not folder.exists():
            folder = folder.parent
        total, free = sum(needed.values()), free_disk(folder)
        if total > free:
            from posttrain.pipeline.plan_text import size

            what = f"the sweep's {len(plans)} runs would leave {size(total)} on disk, and {size(free)} are free"
            raise RecipeError(what, "paths.outputs", "a larger disk (paths.outputs=FOLDER), fewer points, or --yes")


def run_sweep(
    recipe: str, overrides: Sequence[str], name: str, outputs: Path, points: Sequence[SweepPoint], display: Display
) -> SweepResult:
    """Run every point; one that fails does not keep the others from running.

    A stop ends the sweep: the same command goes on, since what is done is in the store.
    """
    folder = outputs / "sweeps" / name
    record = new_record(folder, recipe, overrides, [point.values for point in points])
    failed: list[tuple[str, str]] = []
    code = EXIT_DONE
    for number, (point, entry) in enumerate(zip(points, record["points"], strict=True), 1):
        text = " ".join(f"{key}={value}" for key, value in point.values.items())
        display.note(f"point {number} of {len(points)}: {text}")
        try:
            result = run_plan(point.make(), display)
        except PosttrainError as error:
            entry["status"] = "failed"
            failed.append((text, str(error)))
            save_record(folder, record)
            continue
        entry |= {"run": result.run_dir.name, "status": _status(result)}
        save_record(folder, record)
        if result.exit_code in (EXIT_STOPPED, EXIT_INTERRUPTED):
            code = result.exit_code
            break
        if result.exit_code != EXIT_DONE:
            failed.append((text, result.message))
    report = compare_points(folder, outputs, record)
    return SweepResult(folder, code or (EXIT_FAILED if failed else EXIT_DONE), failed, report)


def new_record(folder: Path, recipe: str, overrides: Sequence[str], values: Sequence[dict[str, str]]) -> dict[str, Any]:
    """The content of a sweep's `sweep.json` before any point has run; makes its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "format": FORMAT,
        "name": folder.name,
        "recipe": recipe,
        "overrides": list(overrides),
        "created": _created(folder) or time.time(),
        "points": [{"values": one, "run": None, "status": "pending"} for one in values],
    }


def save_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a sweep's `sweep.json`."""
    write_json(folder / RECORD, record)


def compare_points(folder: Path, outputs: Path, record: dict[str, Any]) -> Path | None:
    """Build the report that compares the runs of a sweep; None when there are none."""
    from posttrain.report import compare

    runs = [entry["run"] for entry in record["points"] if entry["run"]]
    return compare(folder, [outputs / "runs" / run for run in runs], record) if runs else None


def _status(result: RunResult) -> str:
    return {EXIT_DONE: "done", EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "stopped"}.get(result.exit_code, "failed")


def _created(folder: Path) -> float | None:
    try:
        return float(read_json(folder / RECORD)["created"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_sweep(name: str, outputs: Path) -> tuple[Path, dict[str, Any]] | None:
    """Folder and record of the sweep of that name or at that path; None when there is none."""
    for folder in (outputs / "sweeps" / name, Path(name)):
        if (folder / RECORD).is_file():
            try:
                record = read_json(folder / RECORD)
            except ValueError as error:
                raise RecipeError(f"sweep {name} cannot be read: {error}", str(folder / RECORD)) from error
            return folder, record
    return None


def list_sweeps(outputs: Path) -> list[dict[str, Any]]:
    """Records of all sweeps, the newest first; unreadable ones are passed over."""
    found = []
    for path in (outputs / "sweeps").glob(f"*/{RECORD}"):
        try:
            found.append(read_json(path))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda record: record["created"], reverse=True)
