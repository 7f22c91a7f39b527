"""What can be named: recipes, stage types, and the options of every group, each with a line about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import registry
from posttrain.config.documents import load_document
from posttrain.config.locate import recipe_files, search_path

GROUPS = ("model", "data", "engine", "launcher", "tracker", "debug")


@dataclass(frozen=True)
class Entry:
    """One thing that can be named on the command line."""

    kind: str
    name: str
    path: Path | None
    line: str


def recipes(config_dir: Path | None = None) -> list[Entry]:
    """Recipes by name; the line is their `description`."""
    found = recipe_files(config_dir)
    return [Entry("recipe", name, path, _description(path)) for name, path in sorted(found.items())]


def stages(config_dir: Path | None = None) -> list[Entry]:
    """Stage types that a recipe may use; the line is the first comment of conf/stage/TYPE.yaml."""
    files = {entry.name: entry for entry in options("stage", config_dir)}
    names = [name for name in registry.STAGES if name not in registry.SOURCE_TYPES]
    return [files.get(name, Entry("stage", name, None, "")) for name in names]


def options(group: str, config_dir: Path | None = None) -> list[Entry]:
    """Options of a group, the user's own before shipped ones of the same name."""
    found: dict[str, Path] = {}
    for folder in search_path(config_dir):
        for path in sorted((folder / group).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return [Entry(group, name, path, first_comment(path)) for name, path in sorted(found.items())]


def everything(config_dir: Path | None = None) -> list[Entry]:
    """All of it, in the order in which `posttrain show` looks for a name."""
    found = [*recipes(config_dir), *stages(config_dir)]
    found += [Entry("stage", name, None, "") for name in registry.SOURCE_TYPES]
    return found + [entry for group in GROUPS for entry in options(group, config_dir)]


def first_comment(path: Path) -> str:
    """The first sentence of the comment that a YAML file begins with, without the command in it."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    text = re.split(r":?\s{2,}posttrain |\.\s", line.removeprefix("#").strip(), maxsplit=1)[0]
    return text.rstrip(".:") if line.startswith("#") else ""


def _description(path: Path) -> str:
    data = load_document(path).data
    return str(data.get("description") or "") if isinstance(data, dict) else ""
