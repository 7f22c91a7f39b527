"""`debug=OPTION`, and what a machine sets for itself in a `local` folder."""

from __future__ import annotations

import pytest

from posttrain.config.recipe import load_recipe, load_resolved
from posttrain.errors import RecipeError
from posttrain.pipeline.plan import make_plan


def test_nothing_is_debugged_by_default():
    recipe = load_recipe("x_ecomla", ["scale=demo"])
    assert recipe.frame.debug.model_dump() == {
        "name": "none",
        "max_steps": None,
        "anomaly": False,
        "profile_steps": 0,
        "inline": False,
    }
    assert recipe.stages["distill"].max_steps == 50


def test_steps_end_every_training_stage_early_and_never_later(tmp_path):
    recipe = load_recipe("x_ecomla", ["scale=smoke", "debug=steps", "debug.max_steps=5"])
    assert (recipe.stages["distill"].max_steps, recipe.stages["prefer"].max_steps) == (5, 4)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_resolved(file).stages["distill"].max_steps == 5


def test_steps_change_the_key_and_looking_does_not():
    # A plan of x_ecomla takes the extra `rl`, which the small environment of make test-hydra-next has not.
    keys = {
        option: {stage.name: stage.key for stage in make_plan(load_recipe("transmla", ["scale=smoke", option])).stages}
        for option in ("debug=none", "debug=steps", "debug=anomaly", "debug=profile", "debug=inline")
    }
    assert keys["debug=anomaly"] == keys["debug=profile"] == keys["debug=inline"] == keys["debug=none"]
    assert keys["debug=steps"]["train"] != keys["debug=none"]["train"]
    assert keys["debug=steps"]["upcycle"] == keys["debug=none"]["upcycle"]


def test_anomaly_leaves_out_what_would_hide_the_operation():
    stage = load_recipe("x_ecomla", ["scale=demo", "debug=anomaly"]).stages["distill"]
    assert (stage.compile, stage.cuda_graph) == ("off", "off")


def test_a_local_folder_sets_things_for_this_machine_and_may_be_missing(tmp_path):
    own = tmp_path / "conf" / "local"
    own.mkdir(parents=True)
    assert load_recipe("x_ecomla", ["scale=smoke"], config_dir=tmp_path).frame.tracker.name == "none"
    (own / "default.yaml").write_text("tracker: {name: wandb}\npaths: {outputs: /scratch/me}\n")
    recipe = load_recipe("x_ecomla", ["scale=smoke"], config_dir=tmp_path)
    assert recipe.frame.tracker.name == "wandb" and recipe.frame.paths.outputs == "/scratch/me"
    assert recipe.origins["paths.outputs"].endswith("default.yaml:2")
    typed = load_recipe("x_ecomla", ["scale=smoke", "tracker.name=none"], config_dir=tmp_path)
    assert typed.frame.tracker.name == "none", "what is typed wins"


def test_a_mistake_in_a_local_file_names_it(tmp_path):
    own = tmp_path / "conf" / "local"
    own.mkdir(parents=True)
    (own / "default.yaml").write_text("tracker: {nmae: wandb}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("x_ecomla", ["scale=smoke"], config_dir=tmp_path)
    (problem,) = caught.value.problems
    assert problem.where.endswith("conf/local/default.yaml:1") and problem.fix == "write name instead of nmae"
