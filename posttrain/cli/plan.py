"""`posttrain plan RECIPE [key=value …]`: what would run, why, and what it would cost."""

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
    name: options.Name = None,
    multirun: options.Multirun = False,
    json_: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    config_dir: options.ConfigDir = None,
) -> int:
    """Show the stages of a recipe: in the store or to do, why, and at what cost. Nothing is run or written."""
    from posttrain.config.recipe import load_recipe
    from posttrain.errors import EXIT_DONE, RecipeError
    from posttrain.pipeline.guard import guard
    from posttrain.pipeline.plan import make_plan
    from posttrain.pipeline.plan_text import render

    if multirun:
        from posttrain.cli.sweep import sweep

        selection = {"from_": from_, "until": until, "only": only, "force": force or ()}
        return sweep(recipe, overrides or [], config_dir, selection, name, dry_run=True, yes=True)
    resolved = load_recipe(recipe, overrides or [], config_dir=config_dir)
    plan = make_plan(resolved, from_, until, only, force or (), name=name)
    if json_:
        import json

        typer.echo(json.dumps(plan.to_json(), indent=1, ensure_ascii=False))
        return EXIT_DONE
    try:
        unknown = guard(plan)
    except RecipeError as error:
        # Looking at the cost is what a plan is for: what would stop `run` is said, and is no failure here.
        typer.echo(render(plan))
        typer.echo("\n`posttrain run` would stop here:\n" + "\n".join(str(problem) for problem in error.problems))
        return EXIT_DONE
    typer.echo(render(plan, unknown))
    return EXIT_DONE
