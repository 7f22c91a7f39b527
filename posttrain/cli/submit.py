"""`posttrain submit RECIPE [key=value …]`: a run whose stages are jobs of a Slurm cluster, left to themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from posttrain.cli import options


def command(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    from_: options.From = None,
    until: options.Until = None,
    only: options.Only = None,
    force: options.Force = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the files and commands of the submission, of a sweep (-m) its points; nothing is written.",
        ),
    ] = False,
    name: options.Name = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="Sweep: a job array for each stage of the points.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Submit although it is expensive or may not fit.")] = False,
    config_dir: options.ConfigDir = None,
) -> int:
    """Submit a recipe to Slurm: a job a stage, each after those it needs. The command ends when all are in the queue.

    `posttrain run RECIPE launcher=slurm` does the same and follows the run to its end.

    Exit codes: 0 submitted, 1 Slurm refused a job (none is left), 2 bad input (nothing was submitted).
    """
    from posttrain.cli.run import execute
    from posttrain.config.recipe import load_recipe
    from posttrain.errors import RecipeError
    from posttrain.pipeline.plan import make_plan

    if multirun:
        from posttrain.cli.sweep import sweep

        selection = {"from_": from_, "until": until, "only": only, "force": force or ()}
        given = with_launcher(overrides or [])
        return sweep(recipe, given, config_dir, selection, name, dry_run=dry_run, yes=yes, detach=True)
    resolved = load_recipe(recipe, with_launcher(overrides or []), config_dir=config_dir)
    if resolved.frame.launcher.type != "slurm":
        what = f"launcher={resolved.frame.launcher.name} starts no jobs, so there is nothing to submit"
        raise RecipeError(what, "launcher", "leave it out for launcher=slurm, or use posttrain run")

    def make():
        return make_plan(resolved, from_, until, only, force or (), name=name)

    if dry_run:
        from posttrain.launch.slurm.submit import dry_run as show
        from posttrain.pipeline.guard import guard

        plan = make()
        if not yes:
            guard(plan)
        typer.echo(show(plan))
        return 0
    return execute(make, yes=yes, detach=True)


def with_launcher(overrides: list[str]) -> list[str]:
    """The overrides, with `launcher=slurm` unless they choose another one of this kind."""
    chosen = any(text.lstrip("+").startswith("launcher=") for text in overrides)
    return overrides if chosen else ["launcher=slurm", *overrides]
