"""`posttrain resume [RUN]`: go on with a run from its frozen recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.plan import Plan
    from posttrain.pipeline.run_dir import RunDir


def command(
    run: Annotated[str | None, typer.Argument(help="Run name or its beginning; the newest run when omitted.")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> int:
    """Continue a run that was stopped, killed or has failed; the recipe is the one it was started with.

    Exit codes: as of `posttrain run`.
    """
    from posttrain.cli.run import execute
    from posttrain.pipeline.run_dir import find_run

    found = find_run(run, outputs.absolute())
    # The recipe was held against the guard, or waved through, when the run was started.
    return execute(lambda: frozen_plan(found), yes=True)


def frozen_plan(run: RunDir) -> Plan:
    """The plan of a run's frozen recipe, in the folder the run was started in if that is where it still is."""
    import os

    from posttrain.config.recipe import load_resolved
    from posttrain.errors import RecipeError
    from posttrain.pipeline.plan import make_plan

    record = run.record()
    if not run.recipe_path.exists():
        raise RecipeError(f"run {run.name} has no recipe.yaml to continue from", str(run.path), "start it again")
    resolved = load_resolved(run.recipe_path)
    started_in = Path(record.get("cwd", "."))
    if started_in.is_dir() and (started_in / resolved.frame.paths.outputs).resolve() == run.outputs.resolve():
        # Relative paths in the recipe (a model's folder, a data file) are relative to this folder.
        os.chdir(started_in)
    return make_plan(resolved, name=run.name, outputs=run.outputs)
