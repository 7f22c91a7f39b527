"""Every YAML file that is shipped: composes, is commented, and keeps the rules of the house."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from posttrain import paths
from posttrain.config import load_recipe, registry
from posttrain.config.documents import load_document
from posttrain.config.overrides import PACKAGES, parse
from posttrain.config.schema import Frame
from posttrain.pipeline.graph import Graph

RECIPES = sorted(paths.shipped("recipes").glob("*.yaml"))
CONFIGS = sorted(paths.shipped("conf").rglob("*.yaml"))
NAMES = [path.stem for path in RECIPES]


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (paths.shipped("conf") / group).glob("*.yaml"))


def graph(recipe: str, *overrides: str) -> Graph:
    stages = load_recipe(recipe, list(overrides)).stages
    return Graph({name: (registry.stage(config.type), config) for name, config in stages.items()})


def own_datasets(recipe: str) -> list[tuple[str, str]]:
    """Sections of the further data sets that a recipe adds by name: nobody else chooses an option for them."""
    chosen = [
        key
        for entry in load_document(paths.shipped("recipes") / f"{recipe}.yaml").data["defaults"]
        if isinstance(entry, dict)
        for key in entry
    ]
    return [("datasets", key.removeprefix("data@datasets.")) for key in chosen if key.startswith("data@datasets.")]


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_composes_with_every_model_and_data(recipe: str) -> None:
    for model, data in product(names("model"), names("data")):
        assert graph(recipe, f"model={model}", f"data={data}").order


@pytest.mark.parametrize("recipe", NAMES)
@pytest.mark.parametrize("group", ["engine", "launcher", "tracker"])
def test_a_recipe_composes_with_every_option(recipe: str, group: str) -> None:
    for option in names(group):
        assert getattr(load_recipe(recipe, [f"{group}={option}"]).frame, group).name == option


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_has_the_three_scales_and_each_composes(recipe: str) -> None:
    scales = load_document(paths.shipped("recipes") / f"{recipe}.yaml").data["scales"]
    assert set(scales) >= {"smoke", "demo", "gpu1"}
    for scale in scales:
        assert graph(recipe, f"scale={scale}").order


@pytest.mark.parametrize("recipe", NAMES)
def test_only_smoke_may_choose_another_model_or_data(recipe: str) -> None:
    for scale, entries in load_document(paths.shipped("recipes") / f"{recipe}.yaml").data["scales"].items():
        arguments, problems = parse((entry, entry) for entry in entries)
        assert not problems
        for argument in arguments:
            size = argument.path[0] == "stages" or argument.path[:2] in own_datasets(recipe) and len(argument.path) > 2
            assert size or (scale == "smoke" and argument.key in ("model", "data")), argument.text
            assert argument.key != "stage", "a scale changes sizes, not what the recipe does"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_body_sets_stages_scales_and_its_own_datasets_only(path: Path) -> None:
    data = load_document(path).data
    known = {"defaults", "description", "paper", "datasets", "stages", "scales"}
    assert set(data) <= known, "fields of a group leak into other options"
    assert {("datasets", name) for name in data.get("datasets", {})} <= set(own_datasets(path.stem))
    assert data["description"]
    assert data["defaults"][0] == "base" and data["defaults"][-1] == "_self_"


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_that_follows_a_paper_says_where_it_does_not(recipe: str) -> None:
    head = (paths.shipped("recipes") / f"{recipe}.yaml").read_text(encoding="utf-8").partition("defaults:")[0]
    paper = load_recipe(recipe).frame.paper
    assert (paper is not None) == ("arXiv" in head)
    if paper is not None:
        assert re.search(r"arXiv:([\d.]+\d)", head)[1] in paper.link
        assert paper.differs and all(re.fullmatch(r"[A-Z].*\.", sentence) for sentence in paper.differs)


@pytest.mark.parametrize("path", [*RECIPES, *CONFIGS], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_says_in_its_head_what_it_is(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    assert head, "begin with a comment"
    assert len(head[0]) > 20
    assert re.search(r"\bposttrain \w+ \w+", "\n".join(head)), "name a command that uses it"


@pytest.mark.parametrize("group", ["model", "data"])
def test_the_command_in_an_options_head_composes(group: str) -> None:
    for path in sorted((paths.shipped("conf") / group).glob("*.yaml")):
        typed = re.search(r"posttrain (?:run|plan|show) (.+)", path.read_text(encoding="utf-8"))
        assert typed, f"{path.name}: name a command that uses it"
        recipe, *overrides = typed[1].split()
        assert f"{group}={path.stem}" in overrides
        assert graph(recipe, *overrides).order


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_config_is_an_option_of_a_known_group(path: Path) -> None:
    group = path.parent.relative_to(paths.shipped("conf")).as_posix()
    assert group in (".", *PACKAGES)
    data = load_document(path).data
    if group == "stage":
        assert data["type"] == path.stem and data["type"] in registry.STAGES
    if group in ("engine", "launcher", "tracker"):
        assert data["name"] == path.stem
        Frame.model_fields[group].annotation.model_validate(data)


def test_every_stage_type_has_its_option() -> None:
    assert set(names("stage")) == set(registry.STAGES) - set(registry.SOURCE_TYPES)
