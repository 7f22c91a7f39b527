"""Load a recipe: find it, compose it with its overrides, check it, and say everything that is wrong at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.documents import KeyPath, load_document
from posttrain.config.locate import find_recipe, search_path, shown_path
from posttrain.config.origins import Origins
from posttrain.config.schema import SOURCE_GROUPS, SOURCE_SECTIONS, Frame
from posttrain.config.suggest import among, nearest
from posttrain.config.validate import Checker
from posttrain.errors import Problem, RecipeError

if TYPE_CHECKING:
    from hydra._internal.defaults_list import DefaultsList
    from hydra.core.override_parser.types import Override

    from posttrain.config.compose import Composition, Repository
    from posttrain.config.deviations import Deviation
    from posttrain.config.overrides import Argument, Sorted
    from posttrain.pipeline.stage import StageConfig


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe that has been composed and checked.

    Attributes:
        recipe: its name: the file name without `.yaml`.
        source: its file, None for one given as a mapping.
        overrides: what was typed after it.
        scale: the scale chosen by `scale=NAME`, already applied.
        frame: everything but the stages' settings.
        stages: settings by stage name, sources first under "model", "models.X", "data", "datasets.X".
        deviations: what differs from the recipe without scale and overrides; None where that is no complete recipe.
    """

    recipe: str
    source: Path | None
    overrides: tuple[str, ...]
    scale: str | None
    frame: Frame
    stages: dict[str, StageConfig]
    _origins: Origins = field(default_factory=Origins, repr=False, compare=False)
    _deviations: Callable[[ResolvedRecipe], list[Deviation] | None] = field(
        default=lambda _: [], repr=False, compare=False
    )

    @cached_property
    def deviations(self) -> list[Deviation] | None:
        # Composed at the first question: of the commands only a run that starts asks.
        return self._deviations(self)

    @property
    def origins(self) -> Mapping[str, str]:
        """Dotted key to where it was written; keys that are defaults are not in it."""
        return self._origins.shown()

    def account(self) -> dict[str, Any]:
        """What a reader of a run or an artifact is told of the recipe: name, words, scale, overrides, deviations."""
        frame, differs = self.frame, self.deviations
        return {
            "recipe": self.recipe,
            "description": frame.description,
            "paper": None if frame.paper is None else frame.paper.model_dump(mode="json"),
            "scale": self.scale,
            "overrides": list(self.overrides),
            "deviations": None if differs is None else [one.to_json() for one in differs],
        }

    def document(self) -> dict[str, Any]:
        """The recipe with every default filled in, as a plain mapping that `validate_mapping` accepts."""
        frame = self.frame.model_dump(mode="json", exclude={*SOURCE_SECTIONS, *SOURCE_GROUPS, "stages", "scales"})
        found: dict[str, Any] = {**frame, "stages": {}}
        for name, config in self.stages.items():
            section, _, inner = name.partition(".")
            body = config.model_dump(mode="json")
            if name in SOURCE_SECTIONS:
                found[name] = _without_type(body)
            elif section in SOURCE_GROUPS and inner:
                found.setdefault(section, {})[inner] = _without_type(body)
            else:
                found["stages"][name] = body
        found["stages"] = found.pop("stages")
        return found

    def to_yaml(self) -> str:
        """`document()` as YAML, with name, scale, overrides and deviations in `resolved`; `load_resolved` reads it."""
        head = {"recipe": self.recipe, "scale": self.scale, "overrides": list(self.overrides)}
        differs = None if self.deviations is None else [one.to_json() for one in self.deviations]
        return dump_yaml({"resolved": head | {"deviations": differs}} | self.document())


def dump_yaml(value: Any) -> str:
    """YAML in the order of the mapping, as read back by `load_document`."""
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)


def load_recipe(
    recipe: str, overrides: Sequence[str] = (), config_dir: Path | None = None, cwd: Path | None = None
) -> ResolvedRecipe:
    """Compose and check a recipe.

    Args:
        recipe: a name in `recipes/` (in `config_dir` first), or a path to a YAML file.
        overrides: `key=value`, `group=option`, `scale=NAME`, `~key`, in Hydra's grammar.
        config_dir: the user's own recipes and groups, looked at before the shipped ones; either laid out as `recipes/`
            and `conf/`, or flat.
        cwd: what a relative recipe path is relative to; the current directory if None.

    Raises:
        RecipeError: with every problem found.
    """
    from posttrain.config.compose import Repository

    cwd = Path.cwd() if cwd is None else Path(cwd)
    folders = search_path(config_dir)
    source = find_recipe(recipe, config_dir, cwd)
    if source.parent not in folders:
        folders.insert(0, source.parent)
    repository = Repository(source, folders, lambda path: shown_path(path, cwd))
    return _Loading(repository, list(overrides), source).load()


class _Loading:
    """One recipe on its way from files and overrides to a `ResolvedRecipe`; collects problems as it goes."""

    def __init__(self, repository: Repository, overrides: list[str], source: Path) -> None:
        self.repository = repository
        self.source = source
        self.overrides = overrides
        self.problems: list[Problem] = []
        self.defaults: dict[tuple[str, ...], DefaultsList] = {}

    def load(self) -> ResolvedRecipe:
        from posttrain.config import interpolation, overrides

        own, self.problems = overrides.parse((text, text) for text in self.overrides)
        chosen, own = overrides.take_scale(own)
        composition, result = self._compose(own)
        scale = None
        if chosen is not None:
            entries = self._scale_entries(composition, chosen)
            if entries is not None:
                scale = str(chosen.parsed.value())
                composition, result = self._compose([*entries, *own])
        self.problems += result.problems
        choices = {item.section: item.where for item in result.choices.values()}
        origins = Origins(composition.parts, result.values, self.repository.shown, choices)
        data, unresolved = interpolation.resolve(composition.data, origins)
        checked = Checker(data, origins, self._doubtful(composition)).check()
        problems = [*self.repository.problems, *self.problems, *unresolved, *checked.problems]
        if problems:
            # What stands in files first, then the overrides in the order in which they were typed.
            typed = {text: position for position, text in enumerate(self.overrides, 1)}
            unique = dict.fromkeys(problems)
            raise RecipeError(problems=sorted(unique, key=lambda problem: typed.get(problem.where, 0)))
        return ResolvedRecipe(
            recipe=self.source.stem,
            source=self.source,
            overrides=tuple(self.overrides),
            scale=scale,
            frame=checked.frame,
            stages=checked.stages,
            _origins=origins,
            _deviations=lambda run: self._deviations(run, origins),
        )

    def _deviations(self, run: ResolvedRecipe, origins: Origins) -> list[Deviation] | None:
        from posttrain.config import interpolation
        from posttrain.config.deviations import deviations

        if not self.overrides:
            return []
        try:
            composition, _ = self._compose([])
            own = Origins(composition.parts, shown=self.repository.shown)
            data, unresolved = interpolation.resolve(composition.data, own)
            checked = Checker(data, own).check()
        except RecipeError:
            return None
        if unresolved or checked.problems:
            return None
        return deviations(replace(run, frame=checked.frame, stages=checked.stages), run, origins)

    def _compose(self, arguments: list[Argument]) -> tuple[Composition, Sorted]:
        """The composition with those overrides, and the overrides by what they did, with the problems of some."""
        from posttrain.config import compose, overrides

        defaults = self._defaults_list([])
        result = overrides.sort(arguments, self.repository, defaults.overrides.known_choices)
        if result.choices:
            defaults = self._defaults_list([item.parsed for item in result.choices.values()])
        composition = compose.merge(self.repository, defaults)
        result.problems += overrides.apply_values(composition.data, result.values)
        return composition, result

    def _defaults_list(self, choices: list[Override]) -> DefaultsList:
        """Hydra's defaults list with those group choices; a scale and the overrides beside it ask for the same ones."""
        from posttrain.config import compose

        key = tuple(str(choice.input_line) for choice in choices)
        if key not in self.defaults:
            self.defaults[key] = compose.defaults_list(self.repository, choices)
        return self.defaults[key]

    def _scale_entries(self, composition: Composition, chosen: Argument) -> list[Argument] | None:
        """The overrides of the chosen scale; None, and a problem noted, if there is no such scale."""
        from posttrain.config import overrides

        name = str(chosen.parsed.value())
        scales = composition.data.get("scales") or {}
        if not isinstance(scales, dict) or name not in scales:
            names = list(scales) if isinstance(scales, dict) else []
            guess = nearest(name, names)
            fix = f"write scale={guess}" if guess else f"the scales are {among(names)}" if names else "leave it out"
            self.problems.append(Problem(f"the recipe has no scale `{name}`", chosen.where, fix))
            return None
        entries = scales[name]
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            return None
        origins = Origins(composition.parts, shown=self.repository.shown)
        path: KeyPath = ("scales", name)
        pairs = [(text, f"{origins.of((*path, index)).where} ({text})") for index, text in enumerate(entries)]
        arguments, problems = overrides.parse(pairs)
        self.problems += problems
        return arguments

    def _doubtful(self, composition: Composition) -> set[KeyPath]:
        """Sections whose option does not exist, where another problem would only be an echo of the first."""
        if not self.repository.missing:
            return set()
        defaults = self._defaults_list([])
        return {
            tuple(str(default.package).split("."))
            for default in defaults.defaults
            if default.config_path in self.repository.missing
        }


def _without_type(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("type", "inputs") or (key == "inputs" and value)}


def load_resolved(path: Path) -> ResolvedRecipe:
    """Read what `ResolvedRecipe.to_yaml` wrote; nothing is composed again.

    Raises:
        RecipeError: the file was changed into something that is not a recipe.
    """
    document = load_document(Path(path))
    data = dict(document.data) if isinstance(document.data, dict) else {}
    head = data.pop("resolved", None)
    if not isinstance(head, dict) or not isinstance(head.get("overrides"), list):
        raise RecipeError(f"{path} is no resolved recipe", str(path), "use the recipe.yaml of a run folder")
    return _checked(data, Origins([(document, ())]), str(head.get("recipe")), head)


def validate_mapping(data: Mapping[str, Any], name: str = "recipe") -> ResolvedRecipe:
    """Check a recipe given as a plain mapping, with stages that name their `type`.

    Raises:
        RecipeError: with every problem found.
    """
    return _checked(dict(data), Origins(), name, {})


def _checked(data: dict[str, Any], origins: Origins, name: str, head: Mapping[str, Any]) -> ResolvedRecipe:
    checked = Checker(data, origins).check()
    if checked.problems:
        raise RecipeError(problems=checked.problems)
    overrides = tuple(str(text) for text in head.get("overrides", ()))
    recorded = _read_deviations(head.get("deviations", [] if not head else None))
    found = (name, None, overrides, head.get("scale"), checked.frame, checked.stages, origins)
    return ResolvedRecipe(*found, _deviations=lambda _: recorded)


def _read_deviations(recorded: Any) -> list[Deviation] | None:
    """What `to_yaml` wrote of them; None where it wrote none, such as an older version."""
    from posttrain.config.deviations import Deviation

    try:
        return [Deviation(**one) for one in recorded]
    except TypeError:
        return None
