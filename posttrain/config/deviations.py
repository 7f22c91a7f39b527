"""What a run does otherwise than its recipe as published: without a scale and without overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from posttrain.config.documents import KeyPath
from posttrain.config.schema import SOURCE_GROUPS, SOURCE_SECTIONS

if TYPE_CHECKING:
    from posttrain.config.origins import Origins
    from posttrain.config.recipe import ResolvedRecipe

ABSENT = "(not there)"
SOURCES = (*SOURCE_SECTIONS, *SOURCE_GROUPS)
_COMPARED = ("seed", *SOURCES, "stages")
"""Where it runs, what it is called and what is said of it are not deviations."""


@dataclass(frozen=True)
class Deviation:
    """One setting.

    Attributes:
        key: dotted, as one would type it.
        recipe, run: its value in the recipe as published and in this run; "(not there)" for a part that only one has.
        because: `scale=NAME`, or the override as typed.
    """

    key: str
    recipe: Any
    run: Any
    because: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def deviations(published: ResolvedRecipe, run: ResolvedRecipe, origins: Origins) -> list[Deviation]:
    """Everything in which `run` differs from `published`, in the order of the recipe."""
    before, now = published.document(), run.document()
    names = {"recipe": _names(published), "run": _names(run)}
    found: list[Deviation] = []
    for key in _COMPARED:
        for path, old, new in _differences(before.get(key, ABSENT), now.get(key, ABSENT), (key,)):
            debugged = _debugged(path, new, run)
            found.append(Deviation(".".join(map(str, path)), old, new, debugged or _because(path, run, origins)))
    return _with_named_sources(found, names)


def _differences(old: Any, new: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key, ABSENT), new.get(key, ABSENT), (*path, key))
    elif old != new or type(old) is not type(new):
        yield path, _short(old, path), _short(new, path)


def _short(value: Any, path: KeyPath) -> Any:
    """A whole stage that only one side has is told by its type."""
    if isinstance(value, Mapping) and path[0] == "stages" and len(path) == 2:
        return value.get("type", "a stage")
    return value


def _because(path: KeyPath, run: ResolvedRecipe, origins: Origins) -> str:
    where = _override(path, origins) or origins.choice(path)
    if where is None:
        return "follows from other settings"
    return where if where in run.overrides or run.scale is None else f"scale={run.scale}"


def _debugged(path: KeyPath, value: Any, run: ResolvedRecipe) -> str | None:
    """Why the `debug` section has changed that setting; None where it has not."""
    debug = run.frame.debug
    if path[0] != "stages":
        return None
    if path[-1] == "max_steps" and debug.max_steps is not None and value == debug.max_steps:
        return f"debug={debug.name} (debug.max_steps={debug.max_steps})"
    return f"debug={debug.name}" if debug.anomaly and path[-1] in ("compile", "cuda_graph") else None


def _override(path: KeyPath, origins: Origins) -> str | None:
    """Where the override stands that wrote or deleted that key or a section around it."""
    for size in range(len(path), 0, -1):
        deleted, origin = origins.deleted(path[:size]), origins.exact(path[:size])
        if deleted is not None:
            return deleted.where
        if origin is not None and origin.argument is not None:
            return origin.where
    return None


def _names(recipe: ResolvedRecipe) -> dict[str, str]:
    """Source section to what tables call it."""
    return {name: str(getattr(cfg, "name", name)) for name, cfg in recipe.stages.items() if _source(name)}


def _source(key: str) -> str | None:
    """The source section that a dotted key is in."""
    section, _, rest = key.partition(".")
    if section in SOURCE_SECTIONS:
        return section
    return f"{section}.{rest.partition('.')[0]}" if section in SOURCE_GROUPS and rest else None


def _with_named_sources(found: list[Deviation], names: Mapping[str, Mapping[str, str]]) -> list[Deviation]:
    """Another model or other data is one deviation, told by name, instead of one a field."""
    shown: list[Deviation] = []
    told: set[str] = set()
    for one in found:
        source = _source(one.key)
        if source is None or names["recipe"].get(source) == names["run"].get(source):
            shown.append(one)
        elif source not in told:
            told.add(source)
            before, now = (names[side].get(source, ABSENT) for side in ("recipe", "run"))
            shown.append(Deviation(source, before, now, one.because))
    return shown
