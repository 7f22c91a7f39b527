"""From a resolved recipe to artifacts: graph, keys, plan, store, runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.pipeline.run_dir import RunDir

__all__ = ["run"]


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    yes: bool = False,
    config_dir: str | Path | None = None,
) -> RunDir:
    """Run a recipe, as `posttrain run RECIPE OVERRIDES` does; returns the run's folder once everything is done.

    Raises:
        RecipeError: bad input; nothing ran.
        StageError: a stage failed.
        StopRequested: the run was stopped; running it again continues it.
    """
    from posttrain.config.recipe import load_recipe
    from posttrain.errors import EXIT_DONE, EXIT_FAILED, StageError, StopRequested
    from posttrain.pipeline.plan import make_plan
    from posttrain.pipeline.runner import plan_and_run

    resolved = load_recipe(str(recipe), list(overrides), config_dir=Path(config_dir) if config_dir else None)
    result = plan_and_run(lambda: make_plan(resolved, name=name), yes=yes)
    if result.exit_code == EXIT_FAILED:
        raise StageError(result.message)
    if result.exit_code != EXIT_DONE:
        raise StopRequested
    return result.run_dir
