"""Composition by Hydra: the defaults list of a recipe, merged into one mapping, and what each part came from.

Hydra's Compose API also composes Hydra's own settings (job, logging, launcher), which nothing here uses and which cost
three times the rest, and it keeps the defaults list to itself, which error messages need. So this takes the two steps
that `hydra.compose` itself is made of; tests/config/test_compose.py holds the result to `hydra.compose`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from posttrain.config.documents import Document, load_document
from posttrain.config.inherited import refused
from posttrain.config.locate import counting, the_one
from posttrain.config.suggest import among, nearest
from posttrain.errors import Problem, RecipeError

PRIMARY = "_recipe_"
"""Name of the recipe among the configs; a file of any name may then include a config of the same name."""
MAY_BE_MISSING = "local/"
_NO_CONTENT = OmegaConf.create()
"""Hydra's half of a config is its defaults list; the content is merged here, from the document."""


@dataclass
class Composition:
    """A composed recipe before its values are checked.

    Attributes:
        data: the merged mapping, references not yet followed.
        parts: the files in merge order with the key path they were merged at.
    """

    data: dict[str, Any]
    parts: list[tuple[Document, tuple[str, ...]]]


@dataclass
class Repository(ConfigRepository):
    """The recipe and the folders in which its groups are looked up, first folder first.

    A config that does not exist is noted as a problem and read as its nearest namesake, or as an empty one (`missing`),
    so that everything after it is checked too.
    """

    recipe: Path
    folders: list[Path]
    shown: Any
    problems: list[Problem] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)
    _cache: dict[str, ConfigResult | None] = field(default_factory=dict)
    _documents: dict[str, Document] = field(default_factory=dict)

    @property
    def sources(self) -> list[ConfigSource]:  # type: ignore[override]
        return []

    def document(self, config_path: str) -> Document | None:
        """The file behind a config, None if there is none."""
        return self._documents.get(config_path)

    def composed(self) -> list[Document]:
        """The recipe and the recipes that it includes, as far as they have been read: no options of groups."""
        return [document for path, document in self._documents.items() if "/" not in path]

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self._cache:
            self._cache[config_path] = self._load(config_path)
        return self._cache[config_path]

    def config_exists(self, config_path: str) -> bool:
        return self.find(config_path) is not None

    def group_exists(self, config_path: str) -> bool:
        return bool(config_path) and any((folder / config_path).is_dir() for folder in self.folders)

    def get_group_options(self, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG) -> list[str]:
        files = (path for folder in self.folders for path in (folder / group_name).glob("*.yaml"))
        return sorted({path.stem for path in files if path != self.recipe})

    def find(self, config_path: str) -> Path | None:
        """The file of a config, None if no folder has it."""
        if config_path == PRIMARY:
            return self.recipe
        name = config_path if config_path.endswith(".yaml") else f"{config_path}.yaml"
        files = (folder / name for folder in self.folders)
        # A recipe never includes itself: `base` in a file base.yaml is the next base.
        found = counting(path for path in files if path.is_file() and path != self.recipe)
        return the_one(found, f"`{config_path}`") if found else None

    def _load(self, config_path: str) -> ConfigResult | None:
        path = self.find(config_path)
        if path is None:
            if config_path.startswith(MAY_BE_MISSING):
                return None
            return self._instead_of(config_path)
        document = load_document(path, self.shown(path))
        self._documents[config_path] = document
        data = {} if document.data is None else document.data
        if not isinstance(data, dict):
            raise RecipeError(f"{self.shown(path)} should hold keys and values, not {_kind(data)}", self.shown(path))
        _check_defaults(data.get("defaults"), document, self.shown(path))
        header = ConfigSource._get_header_dict(document.text[:512])
        defaults = self._create_defaults_list(config_path, OmegaConf.create(data.get("defaults") or []))
        return ConfigResult("posttrain", str(path), _NO_CONTENT, header, defaults)

    def _instead_of(self, config_path: str) -> ConfigResult | None:
        group, _, option = config_path.rpartition("/")
        options = self.get_group_options(group)
        guess = nearest(option, options)
        where, entry = self._mention(group, option)
        if group and not self.group_exists(group):
            what = f"there is no group `{group}`: the groups are {among(self.groups())}"
            other = nearest(group, self.groups())
            fix = f"write {entry.replace(group, other, 1)}" if other else ""
        else:
            kind = f"the options of {group}" if group else "what a defaults list can name"
            what = f"`{option}` is not among {kind}: {among(options)}"
            fix = f"write {entry.removesuffix(option)}{guess}" if guess else ""
        if group == "recipes" and option in self.get_group_options(""):
            what, fix = f"a recipe is included by its name, from whichever folder: not by `{entry}`", f"write {option}"
        self.problems.append(Problem(what, where, fix))
        if guess is not None:
            instead = f"{group}/{guess}" if group else guess
            loaded = self.load_config(instead)
            self._documents[config_path] = self._documents[instead]
            return loaded
        self.missing.add(config_path)
        return ConfigResult("posttrain", config_path, _NO_CONTENT, {"package": None}, [])

    def _mention(self, group: str, option: str) -> tuple[str, str]:
        """Where a defaults list names that option, and the entry as written."""
        for document in self._documents.values():
            for index, entry in enumerate(document.data.get("defaults") or []):
                found = f"{document.line_of(('defaults', index))}"
                if isinstance(entry, dict) and len(entry) == 1:
                    key, value = next(iter(entry.items()))
                    if value == option and key.split()[-1].partition("@")[0] == group:
                        return f"{self.shown(document.path)}:{found}", f"{key}: {value}"
                elif str(entry).lstrip("/") in (option, f"{group}/{option}"):
                    return f"{self.shown(document.path)}:{found}", str(entry)
        return "", f"{group}={option}"

    def groups(self) -> list[str]:
        """Names of the folders that hold options."""
        found = {path.parent.name for folder in self.folders for path in folder.glob("*/*.yaml")}
        return sorted(found - {"recipes", "conf"})


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "a truth value"}.get(type(value), "one value")


def _check_defaults(defaults: Any, document: Document, shown: str) -> None:
    line = document.line_of(("defaults",))
    if defaults is None:
        return
    if not isinstance(defaults, list):
        fix = "write entries like - model: smollm2_135m"
        raise RecipeError("`defaults` should be a list", f"{shown}:{line}", fix)
    for index, entry in enumerate(defaults):
        at = f"{shown}:{document.line_of(('defaults', index))}"
        fine = isinstance(entry, str) or (
            isinstance(entry, dict)
            and len(entry) == 1
            and all(isinstance(key, str) and isinstance(value, str | None) for key, value in entry.items())
        )
        if not fine:
            raise RecipeError(f"an entry of `defaults` should be `- group: option` or a name, not {entry!r}", at)
        if "${" in str(entry):
            raise RecipeError("an entry of `defaults` may not be computed", at, "name the option")


@contextmanager
def _as_hydra_1_3() -> Iterator[None]:
    """Hydra's rules of version 1.3 within, whatever the surrounding program chose for its own."""
    base = version.VersionBase.instance()
    before = base.version_base
    try:
        with warnings.catch_warnings():
            # A recipe without `_self_` means "at the end", as Hydra itself takes it; and Hydra 1.4, which has these
            # rules alone, warns of being asked for them.
            warnings.simplefilter("ignore", UserWarning)
            version.setbase("1.3")
            yield
    finally:
        base.version_base = before


def defaults_list(repository: Repository, choices: list[Override]) -> DefaultsList:
    """Hydra's defaults list of the recipe with those group choices.

    Raises:
        RecipeError: the defaults lists cannot be put together.
    """
    try:
        with _as_hydra_1_3():
            return create_defaults_list(repository, PRIMARY, choices, prepend_hydra=False, skip_missing=False)
    except RecursionError:
        what = "the defaults lists of the recipe and its parts include each other without end"
        raise RecipeError(what, repository.shown(repository.recipe)) from None
    except (HydraException, ValueError) as error:
        text = str(error).replace(PRIMARY, repository.recipe.stem).strip()
        # A config that does not exist was read as an empty one, and what it lacks is an echo of that.
        raise RecipeError(problems=repository.problems or [refused(text, repository)]) from None


def merge(repository: Repository, defaults: DefaultsList) -> Composition:
    """Merge the files of a defaults list, last wins, each at its package."""
    data: dict[str, Any] = {}
    parts: list[tuple[Document, tuple[str, ...]]] = []
    for default in defaults.defaults:
        document = repository.document(default.config_path)
        if document is None:
            continue
        package = tuple(default.package.split(".")) if default.package else ()
        part = {key: value for key, value in (document.data or {}).items() if key != "defaults"}
        for name in reversed(package):
            part = {name: part}
        merge_into(data, part)
        parts.append((document, package))
    return Composition(data, parts)


def merge_into(target: dict[str, Any], part: dict[str, Any]) -> None:
    """Write a mapping over another as OmegaConf does: key by key, anything else replaced; `???` writes nothing."""
    for key, value in part.items():
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            merge_into(target[key], value)
        elif value != "???" or key not in target:
            target[key] = deepcopy(value)
