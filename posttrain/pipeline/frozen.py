"""The plan of a run that was started before, from the recipe frozen in its folder: nothing is composed again."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.pipeline.plan import Plan, make_plan
from posttrain.pipeline.run_dir import RunDir


def frozen_plan(run: RunDir) -> Plan:
    """The plan of a run's frozen recipe, in the folder the run was started in if that is where it still is."""
    from posttrain.config.recipe import load_resolved

    record = run.record()
    if not run.recipe_path.exists():
        raise RecipeError(f"run {run.name} has no recipe.yaml to continue from", str(run.path), "start it again")
    resolved = load_resolved(run.recipe_path)
    started_in = Path(record.get("cwd", "."))
    if started_in.is_dir() and (started_in / resolved.frame.paths.outputs).resolve() == run.outputs.resolve():
        # Relative paths in the recipe (a model's folder, a data file) are relative to this folder.
        os.chdir(started_in)
    return make_plan(resolved, name=run.name, outputs=run.outputs)
