"""What can be named: recipes, stage types, and the options of every group, each with a line about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import plugins, registry
from posttrain.config.documents import load_document
from posttrain.config.locate import by_name, owner, recipe_files, search_path

GROUPS = ("model", "data", "engine", "launcher", "tracker", "debug")


@dataclass(frozen=True)
class Entry:
    """One thing that can be named on the command line; `package`: the installed one that adds it, else empty."""

    kind: str
    name: str
    path: Path | None
    line: str
    package: str = ""


def recipes(config_dir: Path | None = None) -> list[Entry]:
    """Recipes by name; the line is their `description`."""
    found = sorted(recipe_files(config_dir).items())
    return [_entry("recipe", name, path, _description(path)) for name, files in found for path in files]


def stages(config_dir: Path | None = None) -> list[Entry]:
    """Stage types that a recipe may use; the line is the first comment of conf/stage/TYPE.yaml."""
    files = {entry.name: entry for entry in options("stage", config_dir)}
    return [files.get(name) or Entry("stage", name, None, "", _stage_package(name)) for name in registry.usable()]


def options(group: str, config_dir: Path | None = None) -> list[Entry]:
    """Options of a group, the user's own instead of others of the same name."""
    found = sorted(by_name(folder / group for folder in search_path(config_dir)).items())
    return [_entry(group, name, path, first_comment(path)) for name, files in found for path in files]


def everything(config_dir: Path | None = None) -> list[Entry]:
    """All of it, in the order in which `posttrain show` looks for a name."""
    found = [*recipes(config_dir), *stages(config_dir)]
    found += [Entry("stage", name, None, "") for name in registry.SOURCE_TYPES]
    found += [entry for group in GROUPS for entry in options(group, config_dir)]
    return found + [
        Entry(plugins.KINDS[plugin.group], plugin.name, None, "", plugin.package)
        for plugin in plugins.found()
        if plugin.group in (plugins.DATA, plugins.REWARDS)
    ]


def first_comment(path: Path) -> str:
    """The first sentence of the comment that a YAML file begins with, without the command in it."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    text = re.split(r":?\s{2,}posttrain |\.\s", line.removeprefix("#").strip(), maxsplit=1)[0]
    return text.rstrip(".:") if line.startswith("#") else ""


def _entry(kind: str, name: str, path: Path, line: str) -> Entry:
    package = owner(path)
    return Entry(kind, name, path, line, "" if package == "posttrain" else package)


def _stage_package(name: str) -> str:
    # A name that several packages have is listed all the same: `posttrain list packages` says what is wrong.
    return next(
        (plugin.package for plugin in plugins.found() if (plugin.group, plugin.name) == (plugins.STAGES, name)), ""
    )


def _description(path: Path) -> str:
    data = load_document(path).data
    return str(data.get("description") or "") if isinstance(data, dict) else ""
