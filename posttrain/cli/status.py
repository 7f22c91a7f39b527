"""`posttrain status [RUN]`: one screen about a run, from its events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.progress import RunState, StageState
    from posttrain.pipeline.run_dir import RunDir


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Show how far a run is: stages, attempts, progress, rate, time left, last loss."""
    from posttrain.pipeline.run_dir import find_run

    typer.echo(screen(find_run(run, outputs)))


def screen(run: RunDir) -> str:
    """The status of a run as text."""
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.plan_text import table
    from posttrain.pipeline.progress import state_of

    record = run.record()
    state = state_of(run.events(), [stage["name"] for stage in record["stages"]])
    alive = held(run.lock_path)
    header = ("stage", "status", "attempts", "progress", "rate", "ETA", "loss", "time")
    rows = [_row(stage, alive) for stage in state.stages.values()]
    lines = [f"{run.name}: {record['recipe']}, {_overall(state, alive)}", ""]
    lines += table(header, rows, right=(2, 3, 4, 5, 6, 7))
    failed = [stage for stage in state.stages.values() if stage.status == "failed"]
    for stage in failed:
        lines += ["", stage.message or f"stage {stage.name} failed"]
    if not alive and state.status != "done":
        lines += ["", f"continue with: posttrain resume {run.name}"]
    if not alive and state.status == "done" and run.report_path.exists():
        lines += ["", f"report: {run.report_path}"]
    return "\n".join(lines)


def _overall(state: RunState, alive: bool) -> str:
    if alive:
        return "stopping" if state.stop_requested else "running"
    return "interrupted (its process is gone)" if state.status == "running" else state.status


def _row(stage: StageState, alive: bool) -> tuple[str, ...]:
    import time

    from posttrain.pipeline.plan_text import big_number, duration

    running = stage.status == "running" and alive
    seconds = stage.seconds + (time.time() - stage.started if running and stage.started is not None else 0.0)
    return (
        stage.name,
        "interrupted" if stage.status == "running" and not alive else stage.status,
        str(stage.attempts or "-"),
        f"{stage.done:g}/{stage.total:g} {stage.unit}" if stage.unit else "-",
        f"{big_number(round(stage.rate, 2))}/s" if stage.rate is not None else "-",
        duration(stage.eta) if running else "-",
        f"{stage.loss:.4g}" if stage.loss is not None else "-",
        duration(seconds) if seconds else "-",
    )
