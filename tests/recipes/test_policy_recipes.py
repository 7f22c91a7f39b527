"""The recipes `grpo` and `riskpo`: their stages, what the scales keep of them, and what distinguishes the two."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from posttrain.config import load_recipe
from posttrain.errors import RecipeError
from posttrain.pipeline.plan import make_plan

ROOT = Path(__file__).parents[2]
RECIPES = ["grpo", "riskpo"]
SCALES = [None, "smoke", "demo", "gpu1"]
ORDER = ["model", "datasets.problems", "teach", "rl", "evaluate_taught", "evaluate"]


def load(recipe: str, scale: str | None, *overrides: str):
    return load_recipe(recipe, [*([f"scale={scale}"] if scale else []), *overrides])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_scale_is_planned(recipe, scale, tmp_path):
    plan = make_plan(load(recipe, scale, f"paths.outputs={tmp_path}"))
    assert [stage.name for stage in plan.stages] == ORDER
    assert all(stage.status == "pending" for stage in plan.stages)
    (learning,) = [stage for stage in plan.stages if stage.name == "rl"]
    assert learning.stage.type == recipe and any("roll-out batches of" in note for note in learning.estimate.notes)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_taught_model_learns_and_is_what_the_result_is_compared_with(recipe, scale):
    found = load(recipe, scale).stages
    assert found["rl"].inputs == {"model": "teach.model", "data": "datasets.problems.train"}
    assert found["evaluate"].inputs == {
        "model": "rl.model",
        "baseline": "teach.model",
        "data": "datasets.problems.heldout",
    }
    assert found["evaluate_taught"].inputs == {
        "model": "teach.model",
        "baseline": "model",
        "data": "datasets.problems.heldout",
    }


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_both_evaluations_measure_alike(recipe, scale):
    found = load(recipe, scale).stages
    one, other = (found[name].model_dump(exclude={"inputs"}) for name in ("evaluate", "evaluate_taught"))
    assert one == other and one["problems"]["samples"] >= max(one["problems"]["k"])


@pytest.mark.parametrize("scale", ["smoke", "demo", "gpu1"])
def test_the_two_differ_in_the_risk_alone(scale):
    """Otherwise a comparison of both recipes would be one of something else as well."""
    common = {"type", "preset", "risk", "risk_reward"}
    one, other = (load(recipe, scale).stages["rl"].model_dump(exclude=common) for recipe in RECIPES)
    differing = {name for name in one if one[name] != other[name]}
    assert differing <= {"importance_sampling_level", "scale_rewards"}
    assert load("riskpo", scale).stages["teach"] == load("grpo", scale).stages["teach"]


def test_the_risk_recipe_is_the_papers_at_full_scale():
    found = load("riskpo", None).stages["rl"]
    assert (found.risk.alpha, found.risk.beta, found.risk.omega, found.risk.bundle_size) == (0.2, 0.8, 0.5, 5)
    assert (found.num_generations, found.questions_per_batch, found.max_completion_length) == (10, 510, 3072)
    assert found.lr == 1e-6 and found.preset == "rb" and found.max_steps == 500


def commands(recipe: str) -> list[list[str]]:
    """Overrides of the commands in the head of a recipe; the words behind them say what one is for."""
    text = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8").replace("\\\n#", "")
    lines = re.findall(rf"^#   posttrain (?:run|plan) {recipe}\b(.*)$", text, re.MULTILINE)
    return [[word for word in line.split() if "=" in word] for line in lines]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_commands_in_its_head_can_be_typed(recipe, tmp_path):
    typed = commands(recipe)
    assert len(typed) >= 6 and any("data@datasets.problems=math" in overrides for overrides in typed)
    for overrides in typed:
        make_plan(load_recipe(recipe, [*overrides, f"paths.outputs={tmp_path}"]))


def test_questions_without_a_scorer_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="reward `correct`"):
        make_plan(load("grpo", None, "data@datasets.problems=math", f"paths.outputs={tmp_path}"))
