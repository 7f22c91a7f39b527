"""`posttrain cancel [RUN]`: stop a run so that it can be resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.run_dir import RunDir


def command(
    run: Annotated[
        str | None,
        typer.Argument(help="Run name or its beginning, or a submitted sweep's name; else the newest run."),
    ] = None,
    now: Annotated[
        bool, typer.Option("--now/--graceful", help="Kill the worker instead of letting it save its state.")
    ] = False,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Ask a run to save its state and stop, and wait until it has. A submitted run's waiting jobs are cancelled.

    Of a submitted sweep, all points are stopped.
    """
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.run_dir import find_run
    from posttrain.pipeline.sweep import find_sweep

    outputs = outputs.absolute()
    sweep = find_sweep(run, outputs) if run is not None else None
    if run is not None and sweep is not None and not (outputs / "runs" / run / "run.json").exists():
        _cancel_points(sweep[1], outputs, now=now)
        return
    found = find_run(run, outputs)
    if _submitted(found):
        from posttrain.launch.slurm.follow import cancel

        cancel(found, now=now)
        typer.echo(how_it_ended(found))
        return
    if not request_stop(found, now=now):
        typer.echo(f"run {found.name} is not running")
        return
    while held(found.lock_path):
        time.sleep(0.1)
    typer.echo(how_it_ended(found))


def _cancel_points(record: Mapping[str, Any], outputs: Path, *, now: bool) -> None:
    """Stop the points of a sweep that are in the queue or running."""
    from posttrain.launch.slurm.follow import cancel
    from posttrain.pipeline.run_dir import RunDir

    runs = [RunDir(outputs / "runs" / point["run"]) for point in record["points"] if point["run"]]
    left = [run for run in runs if run.exists() and _submitted(run)]
    if not left:
        typer.echo(f"sweep {record['name']} has no submitted point left to stop")
        typer.echo("one that runs on this machine ends with the run that it is at: posttrain cancel RUN")
        return
    cancel(*left, now=now)
    for run in left:
        typer.echo(how_it_ended(run))


def _submitted(run: RunDir) -> bool:
    """Whether a run waits for jobs of Slurm's."""
    from posttrain.launch.slurm.ledger import read_ledger

    ledger = read_ledger(run)
    return ledger.slurm and ledger.finished is None


def how_it_ended(run: RunDir) -> str:
    """What to tell who asked a run to stop that is over now: it may have been done, or have failed, before it could."""
    from posttrain.pipeline.progress import state_of

    status = state_of(run.events()).status
    if status == "done":
        return f"run {run.name} finished before it could be stopped"
    if status == "failed":
        return f"run {run.name} failed before it could be stopped; see: {run.typed('status')}"
    return f"run {run.name} has stopped; continue it with: {run.typed('resume')}"


def request_stop(run: RunDir, *, now: bool = False) -> bool:
    """Tell the run's worker and its runner to stop; false when nobody executes the run."""
    from posttrain.launch.job import LOCK, STOP, work_dirs_of
    from posttrain.launch.local import kill_process
    from posttrain.pipeline.events import EventLog
    from posttrain.pipeline.lock import held, holder

    working = [folder for folder in work_dirs_of(run) if held(folder / LOCK)]
    if not held(run.lock_path) and not working:
        return False
    EventLog(run.events_path).append("stop_requested", source="cancel", now=now)
    for folder in working:
        (folder / STOP).touch()
        owner = holder(folder / LOCK) if now else None
        if owner is not None:
            kill_process(owner)
    return True
