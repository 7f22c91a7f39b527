"""What a run does otherwise than its recipe as published, and why; and that words about a paper change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config import load_recipe, load_resolved, registry
from posttrain.pipeline.graph import Graph
from posttrain.pipeline.plan import digest_of_recipe


def found(*overrides: str) -> dict[str, tuple]:
    rows = load_recipe("x_ecomla", list(overrides)).deviations
    assert rows is not None
    return {one.key: (one.recipe, one.run, one.because) for one in rows}


def digest(recipe: str, overrides: list[str], where: Path) -> str:
    resolved = load_recipe(recipe, overrides, cwd=where)
    return digest_of_recipe(
        resolved, Graph({name: (registry.stage(config.type), config) for name, config in resolved.stages.items()})
    )


def test_the_recipe_itself_deviates_in_nothing() -> None:
    assert found() == {}
    assert found("engine=cpu", "run.name=x", "paths.outputs=elsewhere", "tracker=wandb", "description=mine") == {}


def test_a_scale_and_what_was_typed_are_told_apart() -> None:
    rows = found("scale=demo", "stages.distill.lr=1e-4", "seed=3")
    assert rows["stages.distill.max_steps"] == (9200, 50, "scale=demo")
    assert rows["stages.distill.lr"] == (8e-5, 1e-4, "stages.distill.lr=1e-4")
    assert rows["seed"] == (0, 3, "seed=3")
    assert not any(key.startswith("stages.upcycle.kv") for key in rows)


def test_a_typed_value_that_is_the_papers_is_no_deviation() -> None:
    assert "stages.distill.lr" not in found("scale=demo", "stages.distill.lr=8e-5")


def test_another_model_is_one_row_with_both_names() -> None:
    rows = found("scale=smoke")
    assert rows["model"] == ("SmolLM2-135M-Instruct, dequantised Q4_1", "tiny random model", "scale=smoke")
    assert rows["data"][1] == "tiny made-up text"
    assert not any(key.startswith("model.") for key in rows)
    assert found("model=llama32_1b", "scale=demo")["model"][1:] == ("Llama-3.2-1B-Instruct", "model=llama32_1b")
    assert found("data.path=./my.jsonl")["data"][1:] == ("my.jsonl", "data.path=./my.jsonl")
    assert found("model.dtype=float32")["model.dtype"] == (None, "float32", "model.dtype=float32")


def test_stages_that_were_left_out_and_added() -> None:
    typed = ["~stages.prefer", "stages.evaluate.inputs.model=distill.model", "stage@stages.out=export"]
    rows = found(*typed, "stages.out.inputs={model: distill.model}")
    assert rows["stages.prefer"] == ("preference", "(not there)", "~stages.prefer")
    assert rows["stages.evaluate.inputs.model"][:2] == ("prefer.model", "distill.model")
    assert rows["stages.out"] == ("(not there)", "export", "stage@stages.out=export")


def test_steps_that_debugging_cut_short_are_not_laid_on_the_scale() -> None:
    rows = found("scale=demo", "debug=steps")
    steps = rows["stages.distill.max_steps"]
    assert steps[:2] == (9200, steps[1]) and steps[1] < 50 and steps[2] == f"debug=steps (debug.max_steps={steps[1]})"
    assert rows["stages.distill.lr"][2] == "scale=demo"


def test_a_recipe_that_is_not_whole_by_itself_has_no_published_values(tmp_path: Path) -> None:
    recipe = (
        "defaults: [base, model: tiny, stage@stages.up: mla_upcycle, _self_]\nstages: {up: {inputs: {model: model}}}\n"
    )
    (tmp_path / "mine.yaml").write_text(recipe)
    assert load_recipe("./mine.yaml", ["stages.up.kv_ratio=0.5"], cwd=tmp_path).deviations is None


def test_a_resumed_run_knows_them_from_its_frozen_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("x_ecomla", ["scale=demo", "seed=3"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_resolved(tmp_path / "recipe.yaml")
    assert again.deviations == recipe.deviations and again.frame.paper == recipe.frame.paper
    assert again.to_yaml() == recipe.to_yaml()
    old = recipe.to_yaml().replace("\n  deviations:", "\n  others:")
    (tmp_path / "recipe.yaml").write_text(old)
    assert load_resolved(tmp_path / "recipe.yaml").deviations is None


@pytest.mark.parametrize("recipe", ["x_ecomla", "transmla"])
def test_words_about_a_paper_are_not_in_the_recipes_digest(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"defaults: [{recipe}, _self_]\npaper: {{title: a, link: b, differs: [c]}}\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "mine.yaml").write_text(f"defaults: [{recipe}, _self_]\npaper: null\n")
    assert digest("./mine.yaml", [], tmp_path) == digest("./deeper/mine.yaml", [], tmp_path)
    assert digest("./mine.yaml", [], tmp_path) != digest("./mine.yaml", ["seed=1"], tmp_path)
