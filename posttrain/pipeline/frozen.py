"""The plan of a run that was started before, from the recipe frozen in its folder: nothing is composed again."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.pipeline.plan import Plan, make_plan
from posttrain.pipeline.run_dir import RunDir


def frozen_plan(run: RunDir, *, as_started: bool = False) -> Plan:
    """The plan of a run's frozen recipe, in the folder the run was started in if that is where it still is.

    Args:
        as_started: keep to the stages that the run was started with, and to what it was forced to do and has not done.
    """
    from posttrain.config.recipe import load_resolved

    record = run.record()
    if not run.recipe_path.exists():
        raise RecipeError(f"run {run.name} has no recipe.yaml to continue from", str(run.path), "start it again")
    resolved = load_resolved(run.recipe_path)
    started_in = Path(record.get("cwd", "."))
    if started_in.is_dir() and (started_in / resolved.frame.paths.outputs).resolve() == run.outputs.resolve():
        # Relative paths in the recipe (a model's folder, a data file) are relative to this folder.
        os.chdir(started_in)
    stages = {stage["name"]: stage for stage in record["stages"]} if as_started else {}
    # Of a job on a cluster nobody notes that it has begun or is done.
    forced = [name for name in stages if stages[name].get("forced") and resolved.frame.launcher.type != "slurm"]
    return make_plan(
        resolved,
        force=forced,
        name=run.name,
        outputs=run.outputs,
        selected={name for name in stages if stages[name].get("selected", True)} if stages else None,
        begun={name: stages[name]["before"] for name in forced if stages[name]["begun"]},
    )
