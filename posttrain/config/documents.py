"""YAML files read once, with the line of every key kept for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import RecipeError

KeyPath = tuple[str | int, ...]

_MOST_NODES = 20_000

_FLOAT = re.compile(
    r"^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*[eE][-+]?[0-9]+"
    r"|\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as OmegaConf reads it: `1e-4` is a number, dates stay text, nothing builds Python objects."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Document:
    """One YAML file: its data and where each key stands."""

    path: Path
    data: Any
    text: str
    node: yaml.Node | None

    def lines(self) -> Iterator[tuple[KeyPath, int]]:
        """Every key path and list item of the file with its line, counted from 1."""
        if self.node is not None:
            yield from _lines(self.node, ())

    def line_of(self, path: KeyPath) -> int | None:
        """The line of that key, None if the file does not have it."""
        return next((line for found, line in self.lines() if found == path), None)


def load_document(path: Path, shown: str | None = None) -> Document:
    """Read a YAML file.

    Raises:
        RecipeError: not readable, not UTF-8, not YAML, or a key stands twice; with file and line.
    """
    shown = shown or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {shown}: {error}", shown) from None
    # The readers of older PyYAML releases may not take a string with a byte-order mark.
    loader = _Loader(text.removeprefix("\ufeff"))
    try:
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node, shown)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        raise RecipeError(
            f"{shown} is not valid YAML: {error.problem or error.context}", where, _yaml_advice(text, mark)
        ) from None
    except RecursionError:
        raise RecipeError(f"{shown} is nested too deeply or refers to itself", shown) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{shown} is not valid YAML: {error}", shown) from None
    finally:
        loader.dispose()
    return Document(path, data, text, node)


def _yaml_advice(text: str, mark: yaml.Mark | None) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line:
        return "indent with spaces: YAML does not allow tabs"
    return "check the indentation, brackets and colons of this line and the one before it"


def _check_nodes(root: yaml.Node, shown: str) -> None:
    """Refuse a key that stands twice, and aliases that unfold without end."""
    visited = 0

    def walk(node: yaml.Node) -> None:
        nonlocal visited
        visited += 1
        if visited > _MOST_NODES:
            raise RecipeError(f"{shown} unfolds to more than {_MOST_NODES} values", shown, "use fewer YAML aliases")
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                walk(item)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in seen:
                        what = f"the key `{key.value}` stands twice, first in line {seen[key.value]}"
                        raise RecipeError(what, f"{shown}:{line}", "keep one of the two")
                    seen[key.value] = line
                walk(value)

    walk(root)


def _lines(node: yaml.Node, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                here = (*path, key.value)
                yield here, key.start_mark.line + 1
                yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _lines(item, (*path, index))
