"""`posttrain verify [RUN|all]`: hash artifacts again and compare them with their manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN|all]", help="A run, or all artifacts; the newest run when omitted.")
    ] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> int:
    """Re-hash every file of the artifacts; exit code 1 when one is changed, missing or extra."""
    from posttrain.errors import EXIT_DONE, EXIT_FAILED
    from posttrain.pipeline.store import verify

    folders = folders_of(run, outputs)
    broken = 0
    for folder in folders:
        lines = verify(folder)
        shown = folder.relative_to(folder.parents[1])
        typer.echo(f"{shown}: {'ok' if not lines else 'DIFFERS'}")
        for line in lines:
            typer.echo(f"  {line}")
        broken += bool(lines)
    typer.echo(f"{len(folders) - broken} of {len(folders)} artifacts are as they were written")
    if broken:
        typer.echo("remove a changed artifact's folder, and `posttrain run` makes it again", err=True)
    return EXIT_FAILED if broken else EXIT_DONE


def folders_of(run: str | None, outputs: Path) -> list[Path]:
    """Folders of the artifacts that are meant; a run's unfinished stages are left out."""
    from posttrain.pipeline.run_dir import find_run, require_outputs
    from posttrain.pipeline.store import Store

    require_outputs(outputs)
    if run == "all":
        return list(Store(outputs / "store").artifacts())
    found = find_run(run, outputs)
    folders = [found.outputs / stage["artifact"] for stage in found.record()["stages"]]
    return list(dict.fromkeys(folder for folder in folders if (folder / "manifest.json").exists()))
