"""`posttrain report [RUN]`: build the report of a run and say where it is."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
    open_: Annotated[bool, typer.Option("--open", help="Show it in the web browser.")] = False,
) -> None:
    """Write report.md and report.html of a run, finished or not, and print the path."""
    from posttrain.pipeline.run_dir import find_run
    from posttrain.report import build

    path = build(find_run(run, outputs).path)
    typer.echo(str(path))
    if open_:
        webbrowser.open(path.resolve().as_uri())
