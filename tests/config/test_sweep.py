from __future__ import annotations

import pytest

from posttrain.config import sweep
from posttrain.config.sweep import expand, load_points
from posttrain.errors import RecipeError


def values(*overrides: str) -> list[dict[str, str]]:
    return [point.values for point in expand(overrides)]


def test_every_combination_the_last_list_fastest():
    points = expand(["scale=smoke", "seed=1,2", "stages.distill.lr=1e-3,1e-4"])
    assert [point.overrides for point in points] == [
        ("scale=smoke", "seed=1", "stages.distill.lr=0.001"),
        ("scale=smoke", "seed=1", "stages.distill.lr=0.0001"),
        ("scale=smoke", "seed=2", "stages.distill.lr=0.001"),
        ("scale=smoke", "seed=2", "stages.distill.lr=0.0001"),
    ]
    assert str(points[2]) == "seed=2 stages.distill.lr=0.001"


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("seed=range(0,3)", ["0", "1", "2"]),
        ("seed=range(1,10,step=4)", ["1", "5", "9"]),
        ("seed=choice(3,1)", ["3", "1"]),
        ("scale=smoke,demo", ["smoke", "demo"]),
        ("data=glob(*text*)", ["demo_text"]),
        ("data=glob([t*,demo*],exclude=*_samples)", ["demo_text", "tiny"]),
        ("stages.evaluate.prompts=[a],[b,c]", ["[a]", "[b,c]"]),
        ("description='a, b','c'", ["'a, b'", "'c'"]),
    ],
)
def test_hydras_grammar(typed: str, expected: list[str]):
    assert [value for point in values(typed) for value in point.values()] == expected, "as typed, quotes included"


def test_a_group_in_a_package_is_swept_like_any_key():
    assert values("stage@stages.distill=distill,sft") == [
        {"stage@stages.distill": "distill"},
        {"stage@stages.distill": "sft"},
    ]


@pytest.mark.parametrize(
    ("typed", "what", "fix"),
    [
        (["seed=1"], "sweeps nothing", "KEY=A,B"),
        (["seed=interval(0,1)"], "is an interval", "list values"),
        (["data=glob(x*)"], "matches none of the options of data", "demo_text"),
        (["stages.distill.lr=glob(*)"], "is no group", "model"),
        (["seed=1,2", "seed=3,4"], "swept twice", "one list"),
        (["stages.distill.lr=1e-4,0.0001"], "lists 0.0001 more than once", "list it once"),
        (["seed=range(0,1000)"], "has 1000 points; 256 at most", "sweep less"),
        (["seed=range(3,1)"], "seed=range(3,1)", ""),
    ],
)
def test_what_cannot_be_swept(typed: list[str], what: str, fix: str):
    with pytest.raises(RecipeError) as caught:
        expand(typed)
    (problem,) = caught.value.problems
    assert what in problem.what and fix in problem.fix


def test_every_point_is_checked_before_any_runs_and_said_once():
    points = expand(["scale=smoke", "stages.distill.lr=-1,1e-3", "seed=0,1", "stages.distill.max_stesp=3"])
    with pytest.raises(RecipeError) as caught:
        load_points("x_ecomla", points)
    found = [problem.what for problem in caught.value.problems]
    assert len(found) == 2
    assert any(what.startswith("`stages.distill` has no key `max_stesp`") for what in found), "wrong in all points"
    assert any(what.startswith("with stages.distill.lr=-1 seed=0: ") for what in found)


def test_points_are_ordinary_recipes():
    recipes = load_points("x_ecomla", expand(["scale=smoke", "seed=3,4"]))
    assert [recipe.frame.seed for recipe in recipes] == [3, 4]
    assert sweep.MOST_POINTS == 256
