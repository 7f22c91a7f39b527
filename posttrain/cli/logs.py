"""`posttrain logs RUN [STAGE] [-f]`: what a stage's worker printed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.run_dir import RunDir

ACTIVITY_SECONDS = 1.0


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    stage: Annotated[str | None, typer.Argument(help="A stage; the one that was active last when omitted.")] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on as the log grows, then with later attempts and stages, to the end."),
    ] = False,
    attempt: Annotated[int | None, typer.Option(metavar="N", help="An earlier attempt; the last when omitted.")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Print the log of a stage's attempt."""
    from posttrain.pipeline.run_dir import find_run

    found = find_run(run, outputs)
    path = log_of(found, stage, attempt)
    if not follow:
        print_log(path)
        return
    try:
        follow_log(found, path, lambda: log_of(found, stage, attempt))
    except KeyboardInterrupt:
        typer.echo()


def log_of(run: RunDir, stage: str | None, attempt: int | None) -> Path:
    """The log file that is meant. Raises RecipeError with what there is."""
    from posttrain.errors import RecipeError
    from posttrain.pipeline.graph import nearest

    names = [entry["name"] for entry in run.record()["stages"]]
    if stage is None:
        logs = [path for name in names for path in run.logs(name)]
        if not logs:
            raise RecipeError(f"run {run.name} has no logs: all its stages came from the store, or none has started")
        stage = max(logs, key=lambda path: path.stat().st_mtime).parent.name
    if stage not in names:
        near = nearest(stage, names)
        raise RecipeError(f"run {run.name} has no stage '{stage}'", fix=f"write {near}" if near else ", ".join(names))
    logs = run.logs(stage)
    if not logs:
        raise RecipeError(f"stage {stage} of run {run.name} has no log: it came from the store, or has not started")
    if attempt is None:
        return logs[-1]
    path = run.log_path(stage, attempt)
    if path not in logs:
        listed = ", ".join(log.stem.removeprefix("attempt_") for log in logs)
        raise RecipeError(f"stage {stage} has no attempt {attempt}", fix=f"there are: {listed}")
    return path


def print_log(path: Path) -> None:
    """Copy a log to stdout."""
    with path.open("r", encoding="utf-8", errors="replace") as file:
        _copy(file)


def follow_log(run: RunDir, path: Path, newest: Callable[[], Path]) -> None:
    """Copy a log to stdout as it grows, then the log that `newest()` names, until nobody works on the run."""
    from posttrain.pipeline.activity import activity_of

    while True:
        with path.open("r", encoding="utf-8", errors="replace") as file:
            asked = float("-inf")
            while True:
                # Both asked before the copy, so that what was written by then is copied.
                if time.monotonic() - asked > ACTIVITY_SECONDS:
                    alive, asked = activity_of(run).alive, time.monotonic()
                then = newest()
                _copy(file)
                if then != path or not alive:
                    break
                time.sleep(0.2)
        if then == path:
            return
        path = then
        sys.stdout.write(f"\n==> {path.parent.name}, {path.stem.replace('_', ' ')} <==\n")


def _copy(file: TextIO) -> None:
    while chunk := file.read(1 << 16):
        sys.stdout.write(chunk)
    sys.stdout.flush()
