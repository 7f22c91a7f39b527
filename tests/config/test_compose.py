"""Composition gives what Hydra's own Compose API gives."""

from __future__ import annotations

import warnings

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain import paths
from posttrain.config.compose import Repository, defaults_list, merge, merge_into
from posttrain.config.overrides import apply_values, parse, sort

RECIPES = sorted(path.stem for path in paths.shipped("recipes").glob("*.yaml"))
# Ours as the user types it; Hydra's as Hydra wants it. DATA: the recipe's first choice of data, such as `data`.
OVERRIDES = [
    ([], []),
    (["model=tiny", "DATA=tiny", "engine=cpu"], ["model=tiny", "DATA=tiny", "engine=cpu"]),
    (["model@models.teacher=tiny"], ["+model@models.teacher=tiny"]),
    (["stage@stages.evaluate=distill"], ["stage@stages.evaluate=distill"]),
    (
        ["stage@stages.more=evaluate", "stages.more.inputs.model=model"],
        ["+stage@stages.more=evaluate", "++stages.more.inputs.model=model"],
    ),
    (["~stages.evaluate", "seed=3"], ["~stages.evaluate", "++seed=3"]),
    (["~DATA"], ["~DATA"]),
    (["stages.distill={lr: 1e-3, new: {a: [1, 2]}}"], ["++stages.distill={lr: 1e-3, new: {a: [1, 2]}}"]),
    (["stages.distill.inputs={}", "a.b.c='x y'"], ["++stages.distill.inputs={}", "++a.b.c='x y'"]),
    (["scales.smoke=[a,b]", "model.architecture.x=null"], ["++scales.smoke=[a,b]", "++model.architecture.x=null"]),
    (["stages.distill.lr=3", "stages.distill.lr=4"], ["++stages.distill.lr=3", "++stages.distill.lr=4"]),
]


def ours(recipe: str, overrides: list[str]) -> dict:
    folders = [paths.shipped("conf"), paths.shipped("recipes")]
    repository = Repository(paths.shipped("recipes") / f"{recipe}.yaml", folders, str)
    arguments, problems = parse((text, text) for text in overrides)
    known = defaults_list(repository, []).overrides.known_choices
    result = sort(arguments, repository, known)
    composition = merge(repository, defaults_list(repository, [item.parsed for item in result.choices.values()]))
    problems += result.problems + apply_values(composition.data, result.values)
    assert not problems
    return composition.data


def test_composing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours("x_ecomla", ["model=tiny"])


def hydras(recipe: str, overrides: list[str]) -> dict:
    with initialize_config_dir(str(paths.shipped("recipes")), version_base="1.3"):
        search = f"hydra.searchpath=[file://{paths.shipped('conf')}]"
        return OmegaConf.to_container(hydra_compose(recipe, [*overrides, search]))


def first_data(recipe: str) -> str:
    """`data`, or `data@datasets.problems` where the recipe's data have a name of their own."""
    defaults = OmegaConf.load(paths.shipped("recipes") / f"{recipe}.yaml").defaults
    names = [str(name) for entry in defaults if not isinstance(entry, str) for name in entry]
    return next(name for name in names if name.split("@")[0] == "data")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("typed", "for_hydra"), OVERRIDES, ids=lambda value: " ".join(value)[:40])
def test_equal_to_hydras_compose(recipe: str, typed: list[str], for_hydra: list[str]) -> None:
    data = first_data(recipe)
    typed, for_hydra = ([item.replace("DATA", data) for item in items] for items in (typed, for_hydra))
    assert ours(recipe, typed) == hydras(recipe, for_hydra)


def test_merging_agrees_with_omegaconf_on_every_kind_of_value() -> None:
    values = [1, None, "x", "???", [1, {"a": 2}], {}, {"a": 1}, {"a": {"b": [2]}}, {"c": "???"}]
    for first in values:
        for second in values:
            merged: dict = {}
            merge_into(merged, {"k": first})
            merge_into(merged, {"k": second})
            try:
                expected = OmegaConf.to_container(OmegaConf.merge({"k": first}, {"k": second}))
            except (OmegaConfBaseException, TypeError):
                # A list over a mapping or the reverse: the schema has the better message for it. (TypeError since 2.4.)
                expected = {"k": second}
            assert merged == expected, (first, second)
