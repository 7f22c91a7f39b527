"""`posttrain resume [RUN]`: go on with a run from its frozen recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.plan import Plan
    from posttrain.pipeline.run_dir import RunDir


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> int:
    """Continue a run that was stopped, killed or has failed, with the recipe and the stages it was started with.

    What `--until`, `--from` or `--only` left out stays out: `posttrain run` of the same recipe does the rest. What
    `--force` was to do again is done again, from where it stopped (not on Slurm: force it again there).

    A run that was submitted to Slurm is submitted again: the stages that are neither done nor in the queue.

    Exit codes: as of `posttrain run`.
    """
    from posttrain.cli.run import execute
    from posttrain.pipeline.run_dir import find_run

    found = find_run(run, outputs.absolute())
    # The recipe was held against the guard, or waved through, when the run was started.
    return execute(lambda: _plan(found), yes=True, detach=True, anew=True)


def _plan(run: RunDir) -> Plan:
    """What the run was started with; stages that it left out, which nothing has made since, are named."""
    from posttrain.pipeline.frozen import frozen_plan

    plan = frozen_plan(run, as_started=True)
    left = [planned.name for planned in plan.stages if not planned.selected and planned.status != "cached"]
    if left:
        typer.echo(f"left out when the run was last started: {', '.join(left)}; `posttrain run` does them, too")
    return plan
