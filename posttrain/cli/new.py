"""`posttrain new stage NAME`: an installable package with a working stage, its recipe and its tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

NAME = r"[a-z][a-z0-9]*(_[a-z0-9]+)*"


def command(
    kind: Annotated[Literal["stage"], typer.Argument(help="What to make: stage.", show_default=False)],
    name: Annotated[str, typer.Argument(help="Its name in recipes: lower-case letters, digits, _.")],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where to put the package.")] = Path("."),
) -> None:
    """Write a package of your own that adds a stage type, ready to install, run and test."""
    from posttrain.errors import RecipeError
    from posttrain.scaffold.write import files, write_new

    check_name(name)
    distribution = f"posttrain-{name.replace('_', '-')}"
    target = folder / distribution
    if target.exists():
        raise RecipeError(f"{target} exists already", "--dir", "give another name or another folder: --dir DIR")
    if not folder.is_dir():
        raise RecipeError(f"{folder} is no folder", "--dir", f"mkdir -p {folder}")
    words = {
        "name": name,
        "package": f"posttrain_{name}",
        "distribution": distribution,
        "Class": "".join(part.capitalize() for part in name.split("_")),
    }
    write_new(target, files(kind, words))
    typer.echo(f"{target}: a package with the stage type {name}\n\nNext:")
    typer.echo(f"  pip install -e {target}\n  posttrain run {name}_demo scale=smoke\n  pytest {target}")


def check_name(name: str) -> None:
    """Raise RecipeError unless a stage of that name can be added to what there is."""
    import keyword

    from posttrain.config import catalogue, registry
    from posttrain.config.schema import Frame
    from posttrain.errors import RecipeError

    if not re.fullmatch(NAME, name) or keyword.iskeyword(name):
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789") or "my_stage"
        plain = f"{plain}_stage" if keyword.iskeyword(plain) else plain
        what = f"`{name}` cannot be the name of a stage: lower-case letters, digits and _, no word of Python"
        raise RecipeError(what, fix=f"write posttrain new stage {plain}")
    if name in registry.names() or name in Frame.model_fields:
        owner = next((entry.package for entry in catalogue.stages() if entry.name == name), "") or "posttrain"
        what = (
            f"`{name}` is taken: {owner} has a {'stage type' if name in registry.names() else 'section'} of that name"
        )
        raise RecipeError(what, fix=f"write posttrain new stage my_{name}")
