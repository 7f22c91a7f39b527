"""`posttrain init [DIR]`: a folder for recipes, models and data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder; made if missing.")] = Path("."),
) -> None:
    """Write a start for recipes and settings of your own; nothing that is there is touched."""
    from posttrain.scaffold.write import files, write_into

    write_into(folder, files("user", {}))
    first = "" if folder == Path(".") else f"  cd {folder}\n"
    typer.echo(f"{folder}: recipes, conf and an example of data\n\nNext:")
    typer.echo(f"{first}  posttrain run mine --config-dir . scale=smoke")
