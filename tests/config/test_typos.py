"""Any single slip in any key or option is told, at its place, with what was meant."""

from __future__ import annotations

import shlex
from difflib import SequenceMatcher

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config import load_recipe
from posttrain.config.catalogue import options
from posttrain.config.schema import Frame
from posttrain.errors import Problem, RecipeError
from posttrain.pipeline.graph import is_source, section_of

RECIPE = load_recipe("x_ecomla", ["scale=smoke"])
STAGES = [name for name in RECIPE.stages if not is_source(name)]
KEYS = [
    (name, key) for name in STAGES for key in type(RECIPE.stages[name]).model_fields if key != "type" and len(key) > 3
]


@st.composite
def slips(draw: st.DrawFn, word: str) -> str:
    """The word with one letter dropped, doubled, replaced, or swapped with the next."""
    position = draw(st.integers(1, len(word) - 2))
    before, letter, after = word[:position], word[position], word[position + 1 :]
    swapped = before + after[0] + letter + after[1:]
    return draw(st.sampled_from([before + after, before + letter * 2 + after, f"{before}x{after}", swapped]))


def one_problem(overrides: list[str]) -> Problem:
    with pytest.raises(RecipeError) as caught:
        load_recipe("x_ecomla", ["scale=smoke", *overrides])
    assert len(caught.value.problems) == 1, caught.value
    return caught.value.problems[0]


def as_near(suggested: str, meant: str, typed: str) -> bool:
    """The suggestion is what was meant, or at least as like what was typed."""
    return (
        suggested == meant or SequenceMatcher(a=suggested, b=typed).ratio() >= SequenceMatcher(a=meant, b=typed).ratio()
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_slip_in_a_stages_key(data: st.DataObject) -> None:
    stage, key = data.draw(st.sampled_from(KEYS))
    typed = data.draw(slips(key))
    valid = set(type(RECIPE.stages[stage]).model_fields)
    if typed in valid:
        return
    argument = f"stages.{stage}.{typed}=1"
    problem = one_problem([argument])
    assert problem.where == argument
    suggested = problem.fix.removeprefix(f"write stages.{stage}.").removesuffix("=1")
    assert suggested in valid and as_near(suggested, key, typed)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_slip_in_a_stages_name(data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from(STAGES))
    typed = data.draw(slips(stage))
    if typed in STAGES:
        return
    argument = f"stages.{typed}.precision=fp32"
    problem = one_problem([argument])
    assert problem.where == argument
    suggested = problem.fix.removeprefix("write stages.").removesuffix(".precision=fp32")
    assert suggested in STAGES and as_near(suggested, stage, typed)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_slip_in_an_option(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from(["model", "data", "engine", "launcher", "tracker"]))
    names = [entry.name for entry in options(group) if len(entry.name) > 3] or ["auto"]
    option = data.draw(st.sampled_from(names))
    typed = data.draw(slips(option))
    if typed in [entry.name for entry in options(group)]:
        return
    argument = f"{group}={typed}"
    problem = one_problem([argument])
    assert problem.where == argument and f"`{typed}`" in problem.what
    assert as_near(problem.fix.removeprefix(f"write {group}="), option, typed)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_slip_in_a_sections_key(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(["run", "paths", "engine", "tracker"]))
    keys = list(Frame.model_fields[section].annotation.model_fields)
    key = data.draw(st.sampled_from([key for key in keys if len(key) > 3]))
    typed = data.draw(slips(key))
    if typed in keys:
        return
    problem = one_problem([f"{section}.{typed}=1"])
    assert problem.where == f"{section}.{typed}=1"
    assert as_near(problem.fix.removeprefix(f"write {section}.").removesuffix("=1"), key, typed)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_slip_in_a_reference(data: st.DataObject) -> None:
    stage = data.draw(st.sampled_from([*STAGES, "datasets.pairs"]))
    name, reference = data.draw(st.sampled_from(sorted(RECIPE.stages[stage].inputs.items())))
    typed = data.draw(slips(reference))
    if typed == reference:
        return
    argument = f"{section_of(stage)}.inputs.{name}={typed}"
    problem = one_problem([argument])
    assert problem.where == argument
    assert problem.fix.startswith(f"write {section_of(stage)}.inputs.{name}=")


FORMS = ("{}", "stages.distill.lr={}", "model={}", "stages.{}=1", "description={}", "~stages.{}", "model@{}=tiny")


@settings(max_examples=80, deadline=None)
@given(form=st.sampled_from(FORMS), typed=st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30))
def test_whatever_is_typed_ends_in_a_message_or_a_recipe(form: str, typed: str) -> None:
    try:
        load_recipe("x_ecomla", ["scale=smoke", form.format(typed)])
    except RecipeError as error:
        assert all(problem.what and problem.where for problem in error.problems)


@settings(max_examples=40, deadline=None)
@given(value=st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12))
def test_the_quoting_that_is_advised_works(value: str) -> None:
    try:
        load_recipe("x_ecomla", [f"description={value}"])
    except RecipeError as error:
        advice = error.problems[0].fix
        if advice.startswith("quote it: write "):
            (argument,) = shlex.split(advice.removeprefix("quote it: write "))
            try:
                load_recipe("x_ecomla", [argument])
            except RecipeError as second:
                assert "${" in value, second
