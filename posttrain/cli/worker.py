"""`python -m posttrain worker WORKDIR`: what a launcher starts; not meant to be typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    work_dir: Annotated[Path, typer.Argument(metavar="WORKDIR", help="Folder that holds job.json.")],
    watch_stdin: Annotated[bool, typer.Option("--watch-stdin", help="Stop when stdin, a pipe, closes.")] = False,
) -> int:
    """Run the stage of a work folder."""
    from posttrain.launch.worker import main

    return main(work_dir.absolute(), watch_stdin=watch_stdin)
