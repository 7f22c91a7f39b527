"""`-m`: overrides that list several values, expanded into the points of a sweep. Hydra's grammar and its order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, ValueType

from posttrain.config.recipe import ResolvedRecipe, load_recipe
from posttrain.config.suggest import among
from posttrain.errors import Problem, RecipeError

MOST_POINTS = 256


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        values: swept key to this point's value, as typed.
        overrides: all overrides of the run, with one value each.
    """

    values: dict[str, str]
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def expand(overrides: Sequence[str], config_dir: Path | None = None) -> list[Point]:
    """The points of a sweep: every combination, the last list changing fastest.

    Raises:
        RecipeError: with every list that cannot be expanded; nothing is swept; more than `MOST_POINTS` points.
    """
    from posttrain.config.overrides import UNREADABLE, _parser

    axes: list[list[tuple[str | None, str, str]]] = []
    problems: list[Problem] = []
    for text in overrides:
        try:
            parsed = _parser().parse_override(text)
            swept = parsed.is_sweep_override()
        except UNREADABLE:
            swept = False  # what is wrong with it is said when the recipe is loaded
        if not swept:
            axes.append([(None, "", text)])
            continue
        key = text.partition("=")[0]
        values = _values(text, parsed, config_dir, problems)
        axes.append([(key, value, f"{key}={value}") for value in values])
    names = [axis[0][0] for axis in axes if axis and axis[0][0] is not None]
    problems += [
        Problem(f"`{name}` is swept twice", name, "give all its values in one list")
        for name in dict.fromkeys(name for name in names if names.count(name) > 1)
    ]
    if problems:
        raise RecipeError(problems=problems)
    if not names:
        what = "-m sweeps nothing: no override lists several values"
        raise RecipeError(what, fix="write KEY=A,B or KEY=range(1,4) or GROUP=glob(*), or leave out -m")
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MOST_POINTS:
        raise RecipeError(f"the sweep has {count} points; {MOST_POINTS} at most", fix="sweep less at once")
    return [
        Point({key: value for key, value, _ in chosen if key is not None}, tuple(text for _, _, text in chosen))
        for chosen in product(*axes)
    ]


def _values(text: str, parsed: Override, config_dir: Path | None, problems: list[Problem]) -> list[str]:
    if parsed.value_type == ValueType.INTERVAL_SWEEP:
        fix = "list values: KEY=1e-4,3e-4,1e-3"
        problems.append(Problem(f"`{text}` is an interval, which only an optimiser could draw from", text, fix))
        return []
    if parsed.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return _matching(text, parsed, config_dir, problems)
    try:
        values = list(parsed.sweep_string_iterator())
    except Exception as error:  # noqa: BLE001  (Hydra raises what it likes for a range without end)
        problems.append(Problem(f"`{text}` cannot be expanded: {error}", text, "write KEY=A,B or KEY=range(1,4)"))
        return []
    if not values:
        problems.append(Problem(f"`{text}` lists nothing", text, "give at least one value"))
    for value in (value for value in dict.fromkeys(values) if values.count(value) > 1):
        problems.append(Problem(f"`{text}` lists {value} more than once, which is one run", text, "list it once"))
    return values


def _matching(text: str, parsed: Override, config_dir: Path | None, problems: list[Problem]) -> list[str]:
    from posttrain.config import catalogue

    group = parsed.key_or_group
    names = [entry.name for entry in catalogue.options(group, config_dir)]
    glob: Any = parsed.value()
    found = glob.filter(names)
    if not names:
        what, fix = f"`{group}` is no group, so glob() has nothing to match", f"groups are {among(catalogue.GROUPS)}"
        problems.append(Problem(what, text, fix))
    elif not found:
        problems.append(Problem(f"`{text}` matches none of the options of {group}", text, f"there are {among(names)}"))
    return found


def load_points(recipe: str, points: Sequence[Point], config_dir: Path | None = None) -> list[ResolvedRecipe]:
    """Every point's recipe, composed and checked before any of them runs.

    Raises:
        RecipeError: with what is wrong, once, and the first point that it is wrong in where not all have it.
    """
    loaded: list[ResolvedRecipe] = []
    found: dict[Problem, list[Point]] = {}
    for point in points:
        try:
            loaded.append(load_recipe(recipe, point.overrides, config_dir=config_dir))
        except RecipeError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(point)
    if found:
        raise RecipeError(problems=[_placed(problem, at, len(points)) for problem, at in found.items()])
    return loaded


def _placed(problem: Problem, at: list[Point], points: int) -> Problem:
    if len(at) == points:
        return problem
    return Problem(f"with {at[0]}: {problem.what}", problem.where, problem.fix)
