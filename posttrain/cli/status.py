"""`posttrain status [RUN]`: one screen about a run, from its events."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.activity import Activity
    from posttrain.pipeline.progress import StageState
    from posttrain.pipeline.run_dir import RunDir

REDRAW_SECONDS = 2.0


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Redraw until the run is over.")] = False,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Show how far a run is: stages, attempts, jobs, machines, progress, rate, time left, last loss.

    Works for local runs and Slurm jobs alike, and from any machine that sees the folder.
    """
    from posttrain.pipeline.run_dir import find_run

    found = find_run(run, outputs)
    if not watch:
        typer.echo(screen(found))
        return
    try:
        watch_run(found)
    except KeyboardInterrupt:
        typer.echo()


def watch_run(run: RunDir) -> None:
    """Redraw the screen on a terminal, or print it again where it has changed, until nobody works on the run."""
    import sys

    from posttrain.pipeline.activity import activity_of

    shown, terminal = "", sys.stdout.isatty()
    while True:
        activity = activity_of(run)
        text = render(run, activity)
        if terminal:
            # Home, then every line with the rest of it erased: a screen that is cleared first would flicker.
            typer.echo("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in text.splitlines()) + "\x1b[J", nl=False)
        elif text != shown:
            typer.echo(f"{text}\n")
        shown = text
        if not activity.alive:
            return
        time.sleep(REDRAW_SECONDS)


def screen(run: RunDir) -> str:
    """The status of a run as text."""
    from posttrain.pipeline.activity import activity_of

    return render(run, activity_of(run))


def render(run: RunDir, activity: Activity) -> str:
    """The status of a run as text, given what is going on."""
    from posttrain.pipeline.plan_text import table

    state, stages = activity.state, list(activity.state.stages.values())
    jobs = any(stage.job for stage in stages)
    header = ["stage", "status", "attempts", "progress", "rate", "ETA", "loss", "time"]
    rows = [_row(stage, activity) for stage in stages]
    if jobs:
        header += ["job", "node"]
        rows = [(*row, stage.job or "-", stage.node or "-") for row, stage in zip(rows, stages, strict=True)]
    lines = [f"{run.name}: {run.record()['recipe']}, {_overall(activity)}", ""]
    lines += table(tuple(header), rows, right=(2, 3, 4, 5, 6, 7))
    for stage in stages:
        if stage.status == "failed":
            lines += ["", stage.message or f"stage {stage.name} failed"]
        elif stage.status == "cancelled":
            lines += ["", f"stage {stage.name} was cancelled: {stage.message or 'no reason is known'}"]
    if not activity.alive and state.status != "done":
        lines += ["", f"continue with: {run.typed('resume')}"]
    if not activity.alive and state.status == "done" and run.report_path.exists():
        lines += ["", f"report: {run.report_path}"]
    return "\n".join(lines)


def _overall(activity: Activity) -> str:
    state = activity.state
    if activity.alive:
        working = activity.executed or any(activity.runs(stage) for stage in state.stages)
        return "stopping" if state.stop_requested else "running" if working else "queued"
    return "interrupted (its process is gone)" if state.status in ("running", "queued") else state.status


def _row(stage: StageState, activity: Activity) -> tuple[str, ...]:
    from posttrain.pipeline.plan_text import big_number, duration

    running, status = activity.runs(stage.name), stage.status
    if status == "running" and not running:
        status = "interrupted"
    elif stage.name in activity.lost:
        status = "job is gone"
    elif reason := activity.queued.get(stage.name):
        status = f"queued ({reason})"
    seconds = stage.seconds + (time.time() - stage.started if running and stage.started is not None else 0.0)
    return (
        stage.name,
        status,
        str(stage.attempts or "-"),
        f"{stage.done:g}/{stage.total:g} {stage.unit}" if stage.unit else "-",
        f"{big_number(round(stage.rate, 2))}/s" if stage.rate is not None else "-",
        duration(stage.eta) if running else "-",
        f"{stage.loss:.4g}" if stage.loss is not None else "-",
        duration(seconds) if seconds else "-",
    )
