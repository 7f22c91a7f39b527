"""`posttrain report [RUN]`: build the report of a run and say where it is."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN …]", help="A run, a sweep, or several runs to compare; the newest run if omitted."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of a comparison; outputs/compared if omitted.")
    ] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
    open_: Annotated[bool, typer.Option("--open", help="Show it in the web browser.")] = False,
) -> None:
    """Write report.md and report.html of a run, finished or not, or comparing several, and print the path."""
    from posttrain.errors import RecipeError
    from posttrain.pipeline.run_dir import find_run
    from posttrain.pipeline.sweep import find_sweep
    from posttrain.report import build, compare

    names = runs or []
    found = find_sweep(names[0], outputs) if len(names) == 1 else None
    if found is not None:
        folder, record = found
        done = [point["run"] for point in record["points"] if point["run"]]
        if not done:
            raise RecipeError(f"no point of sweep {record['name']} has run yet", str(folder), "start it again")
        path = compare(folder, [outputs / "runs" / name for name in done], record)
    elif len(names) > 1:
        folders = [find_run(name, outputs).path for name in names]
        path = compare(out or outputs / "compared", folders)
    else:
        path = build(find_run(names[0] if names else None, outputs).path)
    typer.echo(str(path))
    if open_:
        webbrowser.open(path.resolve().as_uri())
