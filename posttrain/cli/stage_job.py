"""`posttrain stage-job RUN STAGE`: what a job's batch script runs; not meant to be typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The stage to run.")],
    force: Annotated[bool, typer.Option("--force", help="Run it although it is in the store.")] = False,
    died: Annotated[int | None, typer.Option(metavar="CODE", help="Record how an earlier process ended.")] = None,
) -> int:
    """Run one stage of a submitted run inside its job.

    Exit codes: 0 done, 1 failed, 75 stopped by a signal (requeue), 130 the run was cancelled.
    """
    from posttrain.launch.signals import Interrupts

    # First of all: a signal that comes while the rest is imported must not be lost.
    with Interrupts() as interrupts:
        from posttrain.launch.slurm.stage_job import main

        return main(run, stage, interrupts, force=force, died=died)
