"""What is wrong with a defaults list that Hydra refuses to put together: mostly a recipe that inherits another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from posttrain.config.suggest import among, nearest
from posttrain.errors import Problem

if TYPE_CHECKING:
    from posttrain.config.compose import Repository

_UNMATCHED = re.compile(r"(?:In '[^']*': )?(?:Could not override '|Invalid Defaults List override '/?)([^':]*)")
"""As Hydra 1.3 says it, or 1.4."""
_DOUBLE = re.compile(r"Multiple values for ([^.\s]+)\.")
_EARLY = re.compile(r"In [^:]*: Override '([^':]*?) : ([^']*)' is defined before")


def refused(text: str, repository: Repository) -> Problem:
    """Hydra's refusal with the entry that caused it and what to write there.

    Args:
        text: Hydra's message; three of its forms are known, any other is passed on as it is.
    """
    recipe = repository.shown(repository.recipe)
    what = f"the defaults list does not compose: {text.splitlines()[0].strip()}"
    if found := _UNMATCHED.match(text):
        key = found[1]
        where, value = _entry(repository, f"override {key}")
        keys = sorted({_plain(key) for key, _, _ in _entries(repository) if not key.startswith("override ")})
        guess = nearest(key, keys)
        fix = f"the entries that can be overridden are {among(keys)}" if keys else "include a recipe: - x_ecomla"
        if guess and value:
            fix = f"write override {guess}: {value}"
        return Problem(f"no part of the recipe has `{key}` in its defaults list to override", where or recipe, fix)
    if found := _DOUBLE.match(text):
        where, value = _entry(repository, found[1])
        what = f"`{found[1]}` is chosen twice: what the recipe includes has chosen it already"
        return Problem(what, where or recipe, f"write override {found[1]}: {value or 'OPTION'}, after what is included")
    if found := _EARLY.match(text):
        where, _ = _entry(repository, f"override {found[1]}")
        what = f"`override {found[1]}` stands before entries that override nothing"
        return Problem(what, where or recipe, "move it to the end of the list")
    return Problem(what, recipe)


def _entries(repository: Repository) -> Iterator[tuple[str, str, str]]:
    """Group, option and place of every `group: option` in the defaults lists of files that are no option themselves."""
    for document in repository.composed():
        for index, entry in enumerate((document.data or {}).get("defaults") or []):
            if isinstance(entry, dict) and len(entry) == 1:
                key, value = next(iter(entry.items()))
                yield key, str(value), f"{repository.shown(document.path)}:{document.line_of(('defaults', index))}"


def _entry(repository: Repository, wanted: str) -> tuple[str, str]:
    """Place and option of an entry, whether its group is written `model` or `/model`; the recipe's own first."""
    for key, value, where in _entries(repository):
        if _plain(key) == wanted:
            return where, value
    return "", ""


def _plain(key: str) -> str:
    return re.sub(r"(^|\s)/", r"\1", re.sub(r"^optional\s+", "", key))
