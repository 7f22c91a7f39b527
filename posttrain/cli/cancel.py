"""`posttrain cancel [RUN]`: stop a run so that it can be resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.run_dir import RunDir


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    now: Annotated[
        bool, typer.Option("--now/--graceful", help="Kill the worker instead of letting it save its state.")
    ] = False,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Ask a run to save its state and stop, and wait until it has. A submitted run's waiting jobs are cancelled."""
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.run_dir import find_run

    found = find_run(run, outputs.absolute())
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
        return f"run {run.name} failed before it could be stopped; see: posttrain status {run.name}"
    return f"run {run.name} has stopped; continue it with: posttrain resume {run.name}"


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
