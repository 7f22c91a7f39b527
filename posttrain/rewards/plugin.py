"""Rewards of installed packages: functions that score answers, named in recipes, checked at every call.

A package names a function under the entry-point group `posttrain.rewards`. It gets prompts and completions as plain
text and the rows they belong to, and gives a number for each, or None for what it cannot score. It must depend on
nothing else; `version`, an attribute of the function ("1" without), is raised when its scores change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.config import plugins
from posttrain.config.suggest import among, nearest
from posttrain.errors import RecipeError, StageError

Row = Mapping[str, Any]
Reward = Callable[[Sequence[str], Sequence[str], Sequence[Row]], list[float | None]]


def names() -> list[str]:
    """Rewards that can be named."""
    return plugins.names(plugins.REWARDS)


def load(name: str, where: str = "reward") -> Reward:
    """The reward of that name; it raises StageError where the package's function breaks its promise.

    Raises:
        RecipeError: there is none, or it cannot be loaded.
    """
    plugin, function = _found(name, where)

    def scores(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Row]) -> list[float | None]:
        if not len(prompts) == len(completions) == len(rows):
            raise ValueError(f"{len(prompts)} prompts, {len(completions)} completions, {len(rows)} rows")
        found = function(list(prompts), list(completions), list(rows))
        return _checked(found, len(prompts), f"reward `{name}` of {plugin.origin}", where)

    return scores


def score(name: str, where: str, prompt: str, completion: str, row: Row) -> tuple[float | None, str]:
    """The score of one completion, for a pool. Raises StageError as what `load` gives."""
    return load(name, where)([prompt], [completion], [row])[0], ""


def identity(name: str, where: str = "reward") -> dict[str, str]:
    """What enters a key for a reward: its name, package and version. Raises RecipeError as `load`."""
    plugin, function = _found(name, where)
    return {"name": name, "package": plugin.package, "version": str(getattr(function, "version", "1"))}


def _found(name: str, where: str) -> tuple[plugins.Plugin, Callable[..., Any]]:
    plugin = plugins.lookup(plugins.REWARDS, name)
    if plugin is None:
        guess = nearest(name, names())
        fix = f"{where}={guess}" if guess else f"the rewards are {among(names())}" if names() else ""
        what = f"there is no reward `{name}`" + ("" if names() else ": no installed package has one")
        raise RecipeError(what, where, fix or "install the package that has it, or leave it out")
    function = plugins.load(plugin)
    if not callable(function):
        raise plugins.refuse(plugin, "is not a function")
    return plugin, function


def _checked(found: Any, wanted: int, who: str, where: str) -> list[float | None]:
    """The scores as plain numbers."""
    try:
        values = [None if score is None else float(score) for score in found]
    except (TypeError, ValueError) as error:
        raise StageError(
            f"{who} gave something else than numbers: {error}", where, "return a list of floats"
        ) from error
    if len(values) != wanted:
        raise StageError(f"{who} gave {len(values)} scores for {wanted} answers", where, "return one for each")
    if wrong := [score for score in values if score is not None and not math.isfinite(score)]:
        raise StageError(f"{who} gave {wrong[0]}", where, "return None for what cannot be scored")
    return values
