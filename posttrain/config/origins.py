"""Where every value of a composed recipe was written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.documents import Document, KeyPath

if TYPE_CHECKING:
    from posttrain.config.overrides import Argument


@dataclass(frozen=True)
class Origin:
    """A place: `where` to show, and the override if the value was written as one."""

    where: str
    argument: Argument | None = None


class Origins:
    """Key path to the last place that wrote it. Built at the first question: only errors and `--origin` ask.

    Args:
        parts: the files in merge order with the key path each was merged at.
        arguments: value overrides in order.
        choices: sections filled by a group choice on the command line, with that choice.
    """

    def __init__(
        self,
        parts: Iterable[tuple[Document, tuple[str, ...]]] = (),
        arguments: Iterable[Argument] = (),
        shown: Callable[[Path], str] = str,
        choices: Mapping[KeyPath, str] | None = None,
    ) -> None:
        self._parts = list(parts)
        self._arguments = list(arguments)
        self._shown = shown
        self._choices = choices or {}
        self._map: dict[KeyPath, Origin] | None = None

    def _build(self) -> dict[KeyPath, Origin]:
        if self._map is None:
            self._map = {}
            for document, package in self._parts:
                if package:
                    place = self._choices.get(package, f"{self._shown(document.path)}:1")
                    self._map.setdefault(package, Origin(place))
                for path, line in document.lines():
                    if path[0] != "defaults":
                        self._map[(*package, *path)] = Origin(f"{self._shown(document.path)}:{line}")
            for argument in self._arguments:
                if not argument.parsed.is_delete():
                    self._write(argument.path, argument.parsed.value(), Origin(argument.where, argument))
        return self._map

    def _write(self, path: KeyPath, value: Any, origin: Origin) -> None:
        assert self._map is not None
        self._map[path] = origin
        for key, item in _items(value):
            self._write((*path, key), item, origin)

    def choice(self, path: KeyPath) -> str | None:
        """The group choice that filled the section around that key, as written; None for the recipe's own."""
        return next((where for section, where in self._choices.items() if path[: len(section)] == section), None)

    def exact(self, path: KeyPath) -> Origin | None:
        """Where exactly that key was written, None for a default."""
        return self._build().get(path)

    def of(self, path: KeyPath) -> Origin:
        """Where that key, or else the nearest section around it, was written."""
        origins = self._build()
        for length in range(len(path), 0, -1):
            if path[:length] in origins:
                return origins[path[:length]]
        return Origin(".".join(map(str, path)))

    def below(self, path: KeyPath) -> list[Origin]:
        """Every place that wrote that key or something under it."""
        return [origin for found, origin in self._build().items() if found[: len(path)] == path]

    def to_blame(self, section: KeyPath, said: str) -> Origin:
        """The last override of a setting within a section that a sentence on the section names; without one, where the
        section begins: an override that it does not name may be innocent."""
        named, found = set(re.findall(r"\w+", said)), self.of(section)
        last = -1
        for path, origin in self._build().items():
            if path[: len(section)] == section and path[-1] in named and origin.argument is not None:
                position = self._arguments.index(origin.argument)
                if position > last:
                    last, found = position, origin
        return found

    def deleted(self, path: KeyPath) -> Argument | None:
        """The override that deleted that key, None if none did."""
        deletes = (argument for argument in reversed(self._arguments) if argument.parsed.is_delete())
        return next((argument for argument in deletes if argument.path == path), None)

    def written(self, path: KeyPath) -> Any:
        """The value that files and overrides last wrote at that key, deleted since or not; None if none did."""
        found = None
        for document, package in self._parts:
            if path[: len(package)] == package and (value := _at(document.data, path[len(package) :])) is not None:
                found = value
        for argument in self._arguments:
            if not argument.parsed.is_delete() and path[: len(argument.path)] == argument.path:
                found = _at(argument.parsed.value(), path[len(argument.path) :]) or found
        return found

    def typed_below(self, path: KeyPath) -> list[str]:
        """The overrides as typed on the command line, not those of a scale, that wrote that key or under it."""
        typed = (one.argument.text for one in self.below(path) if one.argument and one.where == one.argument.text)
        return list(dict.fromkeys(typed))

    def shown(self) -> Mapping[str, str]:
        """Dotted key to place."""
        return {".".join(map(str, path)): origin.where for path, origin in self._build().items()}


def _at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _items(value: Any) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()
