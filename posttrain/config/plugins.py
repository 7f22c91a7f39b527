"""What other installed packages add to posttrain, by their entry points; docs/extending.md says how to write one.

Names are read from the packages' metadata, no code of theirs is imported before it is used. Most installations have no
such package, so their metadata files are looked at first, which takes a tenth of the time of `importlib.metadata`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.errors import Problem, RecipeError

STAGES, CONFIG, MODELS = "posttrain.stages", "posttrain.config", "posttrain.models"
DATA, REWARDS = "posttrain.data", "posttrain.rewards"
KINDS = {STAGES: "stage type", CONFIG: "config", MODELS: "model type", DATA: "data builder", REWARDS: "reward"}
"""Group of entry points to what its names are names of."""

_loaded: dict[str, str] = {}


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package: `package` is the distribution's normalised name."""

    group: str
    name: str
    target: str
    package: str
    version: str

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def origin(self) -> str:
        """The package with its version, as messages name it."""
        return f"{self.package} {self.version}"


@cache
def found() -> tuple[Plugin, ...]:
    """Every entry point for posttrain of the packages on `sys.path`, by group, name and package."""
    plugins: dict[str, list[Plugin]] = {}
    for folder in _metadata_folders():
        from importlib.metadata import PathDistribution

        distribution = PathDistribution(folder)
        package = re.sub(r"[-_.]+", "-", distribution.name or folder.name.partition("-")[0]).lower()
        # As for imports, the first place on the path counts; an editable install may be there twice.
        if package not in plugins:
            points = (point for point in distribution.entry_points if point.group in KINDS)
            plugins[package] = [
                Plugin(point.group, point.name, point.value, package, distribution.version or "unknown")
                for point in points
            ]
    everything = (plugin for own in plugins.values() for plugin in own)
    return tuple(sorted(everything, key=lambda plugin: (plugin.group, plugin.name, plugin.package)))


def names(group: str) -> list[str]:
    """What is named in that group, each once."""
    return list(dict.fromkeys(plugin.name for plugin in found() if plugin.group == group))


def lookup(group: str, name: str, built_in: Collection[str] = ()) -> Plugin | None:
    """The entry point of that name, None when no package has it.

    Raises:
        RecipeError: two packages have it, or it is one of posttrain's own (`built_in`).
    """
    plugins = [plugin for plugin in found() if plugin.group == group and plugin.name == name]
    if not plugins:
        return None
    if problem := _clash(plugins, built_in):
        raise RecipeError(problems=[problem])
    return plugins[0]


def load(plugin: Plugin) -> Any:
    """Import what an entry point names; from then on its package is among those `in_use`.

    Raises:
        RecipeError: it cannot be imported, or is not there.
    """
    from importlib import import_module

    module, _, attribute = plugin.target.partition(":")
    try:
        value: Any = import_module(module)
        for part in filter(None, attribute.split(".")):
            value = getattr(value, part)
    except Exception as error:  # whatever foreign code does when it is imported
        said = str(error).strip().splitlines()
        fix = (
            f"`pip install --force-reinstall {plugin.package}` brings what it needs, `pip uninstall {plugin.package}` "
            f'does without it; `python -c "import {module}"` shows where it fails'
        )
        what = f"{KINDS[plugin.group]} `{plugin.name}` of the installed package {plugin.origin} cannot be loaded"
        detail = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
        raise RecipeError(f"{what}: {detail}", _where(plugin), fix) from error
    _loaded[plugin.package] = plugin.version
    return value


def refuse(plugin: Plugin, what: str, fix: str = "") -> RecipeError:
    """The error of something loaded that is not what its entry point promises."""
    text = f"{KINDS[plugin.group]} `{plugin.name}` of the installed package {plugin.origin} {what}"
    return RecipeError(text, _where(plugin), fix or f"correct it, or `pip uninstall {plugin.package}`")


def in_use() -> dict[str, str]:
    """Packages whose code this process has loaded, with their versions."""
    return dict(_loaded)


@cache
def config_folders() -> dict[Path, Plugin]:
    """The `conf` and `recipes` folders of installed packages with the package, without importing any."""
    folders: dict[Path, Plugin] = {}
    for plugin in found():
        if plugin.group == CONFIG:
            root = _package_folder(plugin.target)
            for folder in (root / "conf", root / "recipes") if root is not None else ():
                if folder.is_dir():
                    folders.setdefault(folder, plugin)
    return folders


def problems(built_in: dict[str, Collection[str]]) -> list[Problem]:
    """What is wrong with the installed packages, as far as it shows without importing them.

    Args:
        built_in: group to posttrain's own names in it.
    """
    wrong = []
    for group in KINDS:
        for name in names(group):
            plugins = [plugin for plugin in found() if plugin.group == group and plugin.name == name]
            if group != CONFIG and (problem := _clash(plugins, built_in.get(group, ()))):
                wrong.append(problem)
    present = set(config_folders().values())
    for plugin in found():
        if plugin.group == CONFIG and plugin not in present:
            what = f"the installed package {plugin.origin} has no conf or recipes folder in `{plugin.target}`"
            fix = f"pip install --force-reinstall {plugin.package}"
            wrong.append(Problem(what, _where(plugin), fix))
    return wrong


def forget() -> None:
    """Look at the installed packages anew: for tests, and for a process that has installed one."""
    found.cache_clear()
    config_folders.cache_clear()


def _clash(plugins: list[Plugin], built_in: Collection[str]) -> Problem | None:
    first, *others = plugins
    kind = KINDS[first.group]
    if first.name in built_in:
        owners = " and ".join(plugin.origin for plugin in plugins)
        what = f"{kind} `{first.name}` is posttrain's own, and the installed package {owners} takes its name"
    elif others:
        owners = " and ".join(plugin.origin for plugin in plugins)
        what = f"{kind} `{first.name}` is in several installed packages: {owners}"
    else:
        return None
    return Problem(what, _where(plugins[-1]), f"pip uninstall {plugins[-1].package}, or rename it there")


def _where(plugin: Plugin) -> str:
    return f"{plugin.package}, entry point {plugin.group}: {plugin.name} = {plugin.target}"


def _metadata_folders() -> Iterator[Path]:
    """Metadata folders of packages that have entry points for posttrain, in the order of `sys.path`."""
    for place in dict.fromkeys(sys.path):
        try:
            inside = sorted(entry.path for entry in os.scandir(place or ".") if entry.name.endswith("-info"))
        except OSError:  # not a folder, or none that may be read
            continue
        for folder in inside:
            try:
                with open(os.path.join(folder, "entry_points.txt"), "rb") as file:
                    text = file.read()
            except OSError:
                continue
            if b"[posttrain." in text:
                yield Path(folder)


def _package_folder(package: str) -> Path | None:
    """The folder of an importable package; nothing is imported, not even the parents of `a.b`."""
    from importlib.util import find_spec

    top, *inner = package.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place, *inner)
        if folder.is_dir():
            return folder.resolve()
    return None
