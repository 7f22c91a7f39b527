"""Plain references `${section.key}` within a recipe. Nothing that runs code or asks the machine is resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config.documents import KeyPath
from posttrain.config.origins import Origins
from posttrain.config.suggest import nearest
from posttrain.errors import Problem

_INTERPOLATION = re.compile(r"(?<!\\)\$\{([^}]*)\}")
_OPENING = re.compile(r"(?<!\\)\$\{")
_PLAIN = re.compile(r"\.*[A-Za-z_][\w]*(?:\.\w+|\[\d+\])*")


def resolve(data: dict[str, Any], origins: Origins) -> tuple[dict[str, Any], list[Problem]]:
    """The composed recipe with references followed; one that cannot be becomes a problem and its key is left out.

    `${oc.env:X}` and every other resolver is refused: a recipe must mean the same on every machine, and the resolved
    recipe is what a run is known by.
    """
    found = [(path, text) for path, text in _strings(data, ()) if "${" in text or text == "???"]
    if not found:
        return data, []
    problems = []
    for path, text in found:
        problem = _unusable(path, text, origins)
        if problem is not None:
            problems.append(problem)
            _remove(data, path)
    config = OmegaConf.create(data)
    for path, text in found:
        problem = _unresolved(config, path, text, origins)
        if problem is not None:
            problems.append(problem)
            _remove(data, path)
    resolved: Any = OmegaConf.to_container(OmegaConf.create(data), resolve=True)
    return resolved, problems


def _unusable(path: KeyPath, text: str, origins: Origins) -> Problem | None:
    dotted = ".".join(map(str, path))
    where = origins.of(path).where
    if text == "???":
        return Problem(f"`{dotted}` must be given", where, f"write {dotted}=VALUE")
    inner = _INTERPOLATION.findall(text)
    if len(inner) == len(_OPENING.findall(text)) and all(_PLAIN.fullmatch(reference.strip()) for reference in inner):
        return None
    what = f"`{dotted}` is {text!r}: only plain references like ${{stages.NAME.KEY}} are followed"
    return Problem(what, where, f"write the value itself, or give it on the command line: {dotted}=VALUE")


def _unresolved(config: DictConfig, path: KeyPath, text: str, origins: Origins) -> Problem | None:
    try:
        value: Any = config
        for part in path:
            if part not in (value if OmegaConf.is_dict(value) else range(len(value))):
                return None
            value = value[part]
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = "it refers to itself" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        keys = [".".join(map(str, key)) for key, _ in _leaves(OmegaConf.to_container(config), ()) if key != path]
        reference = _INTERPOLATION.findall(text)[0]
        guess = nearest(reference, keys)
        fix = f"write {text.replace(reference, guess, 1)}" if guess else "name a key that the recipe states"
        fix = f"correct {reference} first" if guess == reference else fix
        return Problem(f"`{'.'.join(map(str, path))}` is {text!r}: {reason}", origins.of(path).where, fix)
    return None


def _strings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    return ((found, leaf) for found, leaf in _leaves(value, path) if isinstance(leaf, str))


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _remove(plain: Any, path: KeyPath) -> None:
    """Take out a value that cannot be resolved; the field's default stands in while the rest is checked."""
    parent = plain
    for part in path[:-1]:
        parent = parent[part]
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    else:
        parent[path[-1]] = None
