"""Loading a recipe that is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.config import load_recipe, load_resolved, validate_mapping
from posttrain.config.documents import load_document
from posttrain.errors import RecipeError

STAGES = ["upcycle", "evaluate_converted", "distill", "prefer", "evaluate"]


def test_stages_and_sources_carry_their_types() -> None:
    recipe = load_recipe("x_ecomla")
    assert list(recipe.stages) == ["model", "data", "datasets.pairs", *STAGES]
    assert [recipe.stages[name].type for name in ("model", "data", "upcycle", "evaluate")] == [
        "model_source",
        "data_source",
        "mla_upcycle",
        "evaluate",
    ]
    assert recipe.stages["distill"].inputs == {"student": "upcycle.model", "teacher": "model", "data": "data.train"}


def test_defaults_of_the_recipe_are_the_papers() -> None:
    distill = load_recipe("x_ecomla").stages["distill"]
    assert (distill.max_steps * distill.tokens_per_step) / 1e9 == pytest.approx(3.6, rel=0.01)
    assert (distill.lr, distill.lr_scheduler, distill.warmup_ratio) == (8e-5, "cosine", 0.01)
    assert (distill.reduction, distill.temperature, distill.ce_weight) == ("batch_sum", 1.0, 0.0)


def test_the_users_overrides_win_over_the_scale_wherever_they_stand() -> None:
    plain = load_recipe("x_ecomla", ["scale=smoke"])
    for arguments in (["scale=smoke", "stages.distill.max_steps=7"], ["stages.distill.max_steps=7", "+scale=smoke"]):
        changed = load_recipe("x_ecomla", arguments)
        assert changed.scale == "smoke"
        assert changed.stages["distill"] == plain.stages["distill"].model_copy(update={"max_steps": 7})
    assert load_recipe("x_ecomla", ["scale=smoke", "model=smollm2_135m"]).stages["model"].package is not None
    assert plain.stages["model"].random


def test_the_last_scale_and_the_last_value_win() -> None:
    recipe = load_recipe("x_ecomla", ["scale=demo", "scale=smoke", "seed=1", "seed=2"])
    assert recipe.scale == "smoke" and recipe.frame.seed == 2
    assert load_recipe("x_ecomla", ["scale=smoke", "scale=null"]).scale is None


@pytest.mark.parametrize("plus", ["", "+"])
def test_further_sources_and_stages_with_or_without_a_plus(plus: str) -> None:
    recipe = load_recipe(
        "x_ecomla",
        [
            f"{plus}model@models.teacher=llama32_1b",
            f"{plus}data@datasets.more=tiny",
            f"{plus}stage@stages.last=evaluate",
            "stages.last.inputs={model: model, data: datasets.more.heldout}",
            "stages.distill.inputs.teacher=models.teacher",
        ],
    )
    assert recipe.stages["models.teacher"].hub == "meta-llama/Llama-3.2-1B-Instruct"
    assert recipe.stages["datasets.more"].type == "data_source"
    assert recipe.stages["last"].inputs == {"model": "model", "data": "datasets.more.heldout"}


def test_a_stage_can_be_deleted_with_what_needs_it() -> None:
    recipe = load_recipe("x_ecomla", ["~stages.distill", "~stages.prefer", "~stages.evaluate"])
    assert [name for name in recipe.stages if name in STAGES] == ["upcycle", "evaluate_converted"]


def test_a_field_that_no_yaml_mentions_can_be_set_with_or_without_a_plus() -> None:
    for text in (
        "stages.distill.weight_decay=0.1",
        "+stages.distill.weight_decay=0.1",
        "++stages.distill.weight_decay=0.1",
    ):
        assert load_recipe("x_ecomla", [text]).stages["distill"].weight_decay == 0.1


def test_a_recipe_by_path_uses_the_shipped_groups_and_its_own_first(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# mine\npath: ./weights\n")
    # Of the same name as a file that it includes.
    (tmp_path / "base.yaml").write_text(
        "defaults:\n  - base\n  - model: mine\n  - data: tiny\n  - stage@stages.e: evaluate\n  - _self_\n"
        "stages:\n  e: {inputs: {model: model, data: data.heldout}}\n"
    )
    recipe = load_recipe("./base.yaml", cwd=tmp_path)
    assert recipe.recipe == "base" and recipe.source == tmp_path / "base.yaml"
    assert recipe.stages["model"].path == "./weights"
    assert recipe.frame.engine.name == "auto"


@pytest.mark.parametrize("layout", ["", "nested"])
def test_a_config_dir_comes_before_the_shipped_one(tmp_path: Path, layout: str) -> None:
    recipes, conf = (tmp_path / "recipes", tmp_path / "conf") if layout else (tmp_path, tmp_path)
    for folder in (recipes, conf / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    (conf / "data" / "demo_text.yaml").write_text("# mine\npath: ./mine.jsonl\n")
    (recipes / "other.yaml").write_text("defaults: [x_ecomla, _self_]\ndescription: mine\n")
    recipe = load_recipe("other", ["scale=demo"], config_dir=tmp_path)
    assert recipe.frame.description == "mine"
    assert recipe.stages["data"].path == "./mine.jsonl"
    assert recipe.stages["distill"].max_steps == load_recipe("x_ecomla", ["scale=demo"]).stages["distill"].max_steps


def test_references_between_values_are_followed() -> None:
    recipe = load_recipe(
        "x_ecomla", ["stages.evaluate.max_tokens=${stages.distill.sequence_length}", "run.name=a${seed}", "seed=4"]
    )
    assert recipe.stages["evaluate"].max_tokens == 2048
    assert recipe.frame.run.name == "a4"


def test_the_local_group_may_be_there_or_not(tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("tracker: {name: wandb}\n")
    assert load_recipe("x_ecomla").frame.tracker.name == "none"
    assert load_recipe("x_ecomla", config_dir=tmp_path).frame.tracker.name == "wandb"


def test_the_resolved_recipe_survives_a_round_trip(tmp_path: Path) -> None:
    overrides = ["scale=smoke", "model@models.other=tiny", "stages.distill.lr=3e-4"]
    recipe = load_recipe("x_ecomla", overrides)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = load_resolved(path)
    assert again.document() == recipe.document()
    assert again.stages == recipe.stages
    assert (again.recipe, again.scale, again.overrides) == ("x_ecomla", "smoke", tuple(overrides))
    assert again.to_yaml() == recipe.to_yaml()


def test_a_resolved_recipe_that_was_edited_badly_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(load_recipe("x_ecomla").to_yaml().replace("max_steps:", "max_stesp:"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "max_stesp" in text)
    with pytest.raises(RecipeError) as caught:
        load_resolved(path)
    assert caught.value.problems[0].where.endswith(f"recipe.yaml:{line}")
    path.write_text("seed: 1\n")
    with pytest.raises(RecipeError, match="no resolved recipe"):
        load_resolved(path)


def test_a_mapping_is_checked_like_a_file() -> None:
    document = load_recipe("x_ecomla", ["scale=smoke"]).document()
    assert validate_mapping(document).document() == document
    document["stages"]["distill"]["max_stesp"] = 3
    with pytest.raises(RecipeError, match="max_stesp"):
        validate_mapping(document)


def test_origins_name_the_file_and_line_or_the_argument() -> None:
    root = Path(__file__).parents[2]
    recipe = load_recipe("x_ecomla", ["scale=smoke", "stages.distill.lr=1e-3"], cwd=root)
    origins = recipe.origins
    assert origins["stages.distill.lr"] == "stages.distill.lr=1e-3"
    for key, path in (
        ("stages.upcycle.kv_ratio", ("stages", "upcycle", "kv_ratio")),
        ("description", ("description",)),
    ):
        line = load_document(root / "recipes/x_ecomla.yaml").line_of(path)
        assert origins[key] == f"recipes/x_ecomla.yaml:{line}"
    assert origins["stages.upcycle.type"].startswith("conf/stage/mla_upcycle.yaml:")
    assert origins["model.random"].startswith("conf/model/tiny.yaml:")
    entry = "stages.distill.precision=fp32"
    index = load_document(root / "recipes/x_ecomla.yaml").data["scales"]["smoke"].index(entry)
    line = load_document(root / "recipes/x_ecomla.yaml").line_of(("scales", "smoke", index))
    assert origins["stages.distill.precision"] == f"recipes/x_ecomla.yaml:{line} ({entry})"
    assert "stages.distill.weight_decay" not in origins


def test_loading_leaves_hydra_as_it_found_it() -> None:
    from hydra import version
    from hydra.core.global_hydra import GlobalHydra

    before = version.VersionBase.instance().version_base
    load_recipe("x_ecomla", ["scale=smoke"])
    assert version.VersionBase.instance().version_base is before
    assert not GlobalHydra.instance().is_initialized()
