"""`posttrain adopt RECIPE STAGE FOLDER [key=value …]`: take a hand-made artifact for the result of a stage."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or the path of a YAML file.")],
    stage: Annotated[str, typer.Argument(help="The stage that the artifact is to be the result of.")],
    folder: Annotated[Path, typer.Argument(help="The artifact: a folder for each output, or the first output itself.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value …]", help="Settings, in Hydra's grammar.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take the place of an artifact that is there.")] = False,
    config_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own recipes and groups, looked at first.")
    ] = None,
) -> None:
    """Check a hand-made artifact, copy it into the store, and let later stages go on from it."""
    from posttrain.config.recipe import load_recipe
    from posttrain.launch.adopt import adopt
    from posttrain.pipeline.plan import make_plan

    plan = make_plan(load_recipe(recipe, overrides or [], config_dir=config_dir), replacing=stage)
    artifact = adopt(plan, stage, folder, force=force)
    typer.echo(f"{stage}: adopted as {artifact.folder}")
    if made_up := artifact.manifest["adopted"]["made_up"]:
        typer.echo(f"{', '.join(made_up)}: empty, as nothing is known of it")
    own = [] if config_dir is None else ["--config-dir", str(config_dir)]
    typer.echo(f"go on with: {shlex.join(['posttrain', 'run', recipe, *own, *(overrides or [])])}")
