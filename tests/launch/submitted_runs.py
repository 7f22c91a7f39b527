"""Recipes of toy stages that are submitted, to commands that pretend to be Slurm's."""

from __future__ import annotations

import time
from dataclasses import replace

from toy_stages import ToyEvaluateConfig, toy_recipe

from posttrain.launch.slurm.submit import submit
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.stage_runner import Quiet

SLURM = {"launcher": {"name": "slurm", "type": "slurm"}, "run": {"name": "mine"}}


def recipe(**settings):
    """The toy recipe, with a source that is a stage like others: it is read again from its file."""
    resolved = toy_recipe(inputs={"data": "source.train"}, **settings)
    evaluate = ToyEvaluateConfig(inputs={"history": "train.history", "data": "source.heldout"})
    stages = {"source": resolved.stages["data"], **resolved.stages, "evaluate": evaluate}
    return replace(resolved, stages={name: cfg for name, cfg in stages.items() if name != "data"})


def plan(launcher=None, **settings):
    frame = {**SLURM, "launcher": {**SLURM["launcher"], **(launcher or {})}}
    return make_plan(recipe(frame=frame, **settings))


def submitted(**settings):
    made = plan(**settings)
    submit(made, Quiet())
    return made


def kinds(run):
    return [(event["event"], event["stage"]) for event in run.events()]


def when(made, event, act):
    """Do something as soon as an event has come."""

    def wait():
        while not any(one["event"] == event and one["stage"] == "train" for one in made.run_dir.events()):
            time.sleep(0.02)
        act()

    return wait
