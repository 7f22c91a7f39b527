"""The composed mapping against its schemas: frame, sources, stages and the references between them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.config import registry
from posttrain.config.documents import KeyPath
from posttrain.config.explain import instead, problems_of, show_value
from posttrain.config.origins import Origin, Origins
from posttrain.config.schema import SOURCE_GROUPS, SOURCE_SECTIONS, Debug, Frame
from posttrain.config.suggest import among, nearest
from posttrain.errors import Problem, RecipeError

if TYPE_CHECKING:
    from posttrain.config.overrides import Argument
    from posttrain.pipeline.stage import Stage, StageConfig

SECTIONS = tuple(Frame.model_fields)


def _for_debugging(config: StageConfig, debug: Debug) -> StageConfig:
    """The settings as the recipe's `debug` section has them changed, where the stage has such settings."""
    changes: dict[str, Any] = {}
    fields = type(config).model_fields
    if debug.max_steps is not None and "max_steps" in fields:
        changes["max_steps"] = min(config.max_steps, debug.max_steps)
    if debug.anomaly:
        changes |= {name: "off" for name in ("compile", "cuda_graph") if name in fields}
    return config.model_copy(update=changes) if changes else config


@dataclass
class Checked:
    """A checked recipe: sources and stages by name, and everything that is wrong with it."""

    frame: Frame = field(default_factory=Frame)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Checker:
    """Checks one composed recipe; `doubtful` are sections that stand for an option that does not exist."""

    def __init__(self, data: dict[str, Any], origins: Origins, doubtful: set[KeyPath] | None = None) -> None:
        self.data = data
        self.origins = origins
        self.doubtful = doubtful or set()
        self.result = Checked()
        self.pairs: dict[str, tuple[Stage, StageConfig]] = {}
        self.untyped: set[str] = set()

    def check(self) -> Checked:
        """Check everything; never stops at the first problem."""
        self._targets(self.data, ())
        sections = self._frame()
        for path, type_name in self._sources(sections):
            self._source(path, type_name)
        stages = sections.get("stages")
        for name in stages if isinstance(stages, dict) else ():
            if isinstance(stages[name], dict):
                self._stage(str(name), stages[name])
            else:
                self.untyped.add(str(name))
        self._references()
        self._launcher()
        self.result.stages = {name: config for name, (_, config) in self.pairs.items()}
        return self.result

    def add(self, what: str, where: str, fix: str = "") -> None:
        self.result.problems.append(Problem(what, where, fix))

    def _targets(self, value: Any, path: KeyPath) -> None:
        if isinstance(value, dict):
            if "_target_" in value:
                from posttrain.config.overrides import refused_target

                self.result.problems.append(refused_target(self.origins.of((*path, "_target_")).where))
                del value["_target_"]
            for key, item in value.items():
                self._targets(item, (*path, key))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                self._targets(item, (*path, index))

    def _frame(self) -> dict[str, Any]:
        data = dict(self.data)
        for key in [key for key in data if key not in SECTIONS]:
            self._unknown_section(str(key))
            del data[key]
        try:
            self.result.frame = Frame.model_validate(data)
        except ValidationError as error:
            self.result.problems += problems_of(error, Frame, (), data, self.origins)
        return data

    def _unknown_section(self, key: str) -> None:
        origin = self.origins.of((key,))
        places = self.origins.below((key,)) or [origin]
        stages = self.data.get("stages")
        stage = nearest(key, stages) if isinstance(stages, dict) else None
        guess = nearest(key, SECTIONS)
        for place in places if places[0].argument is not None else places[:1]:
            fix = f"the sections are {among(SECTIONS)}"
            if place.argument is not None:
                rest = [str(part) for part in place.argument.path[1:]]
                if not rest and nearest(key, [*SECTIONS, "scale"]) == "scale":
                    fix = f"write {place.argument.with_key('scale')}"
                elif guess and (stage is None or not rest):
                    fix = f"write {place.argument.with_key('.'.join([guess, *rest]))}"
                elif stage and (rest or isinstance(place.argument.parsed.value(), dict)):
                    fix = f"write {place.argument.with_key('.'.join(['stages', stage, *rest]))}"
            elif guess:
                fix = f"write {guess} instead of {key}"
            self.add(f"the recipe has no section `{key}`", place.where, fix)

    def _sources(self, data: dict[str, Any]) -> list[tuple[KeyPath, str]]:
        found: list[tuple[KeyPath, str]] = []
        for section, type_name in SOURCE_SECTIONS.items():
            if isinstance(data.get(section), dict):
                found.append(((section,), type_name))
        for section, type_name in SOURCE_GROUPS.items():
            group = data.get(section)
            if isinstance(group, dict):
                found += [((section, str(name)), type_name) for name in group if isinstance(group[name], dict)]
        return found

    def _source(self, path: KeyPath, type_name: str) -> None:
        body: Any = self.data
        for part in path:
            body = body[part]
        if len(path) > 1:
            self._check_name(str(path[-1]), path)
        self._config(".".join(map(str, path)), path, type_name, {"type": type_name, **body})

    def _stage(self, name: str, body: dict[str, Any]) -> None:
        path: KeyPath = ("stages", name)
        self._check_name(name, path)
        if name in (*SOURCE_SECTIONS, *SOURCE_GROUPS):
            what = f"a stage may not be called `{name}`: that names a source"
            self.add(what, self.origins.of(path).where, "rename it")
            return
        type_name = body.get("type")
        known = registry.usable()
        if type_name in known:
            self._config(name, path, str(type_name), body)
            return
        self.untyped.add(name)
        if path in self.doubtful:
            return
        if type_name is None:
            self._husk(name, path)
            return
        origin = self.origins.of((*path, "type"))
        guess = nearest(str(type_name), known)
        fix = (
            instead(origin, (*path, "type"), guess)
            if guess
            else f"the types are {among(known)}; a package can add more"
        )
        self.add(f"stage `{name}` has an unknown type `{show_value(type_name)}`", origin.where, fix)

    def _husk(self, name: str, path: KeyPath) -> None:
        """A stage without a type: a misspelt stage in an override, or one whose type was never chosen or removed."""
        places = self.origins.below(path)
        others = [other for other in self.data["stages"] if other != name]
        if places and all(place.argument is not None for place in places):
            for place in {place.where: place for place in places}.values():
                self._unknown_stage(name, place, others)
            return
        fix = f"choose one with stage@stages.{name}=TYPE, or delete the stage with ~stages.{name}"
        self.add(f"stage `{name}` has no type", self.origins.of(path).where, fix)

    def _unknown_stage(self, name: str, place: Origin, others: list[str]) -> None:
        assert place.argument is not None
        guess = nearest(name, others)
        rest = [str(part) for part in place.argument.path[2:]]
        if guess:
            fix = f"write {place.argument.with_key('.'.join(['stages', guess, *rest]))}"
        else:
            fix = f"the stages are {among(others)}; stage@stages.{name}=TYPE adds one, ~stages.{name} deletes it"
        self.add(f"the recipe has no stage `{name}`", place.where, fix)

    def _check_name(self, name: str, path: KeyPath) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            what = f"`{name}` cannot be a name: letters, digits and _ only, not starting with a digit"
            plain = re.sub(r"[^A-Za-z0-9_]+", "_", name).strip("_0123456789") or "name"
            self.add(what, self.origins.of(path).where, f"write {plain}")

    def _config(self, name: str, path: KeyPath, type_name: str, body: dict[str, Any]) -> None:
        try:
            stage = registry.stage(type_name)
            model = stage.config_for(body)
        except RecipeError as error:  # of an installed package that cannot be used
            self.result.problems += error.problems
            self.untyped.add(name)
            return
        try:
            config = model.model_validate(body)
        except ValidationError as error:
            if path not in self.doubtful:
                self.result.problems += problems_of(error, model, path, body, self.origins, type_name)
            inputs = body.get("inputs")
            inputs = {k: v for k, v in inputs.items() if isinstance(v, str)} if isinstance(inputs, dict) else {}
            config = stage.Config.model_construct(type=type_name, inputs=inputs)
        else:
            self._overruled(path, config, body)
            config = _for_debugging(config, self.result.frame.debug)
        self.pairs[name] = (stage, config)

    def _overruled(self, path: KeyPath, config: StageConfig, body: dict[str, Any]) -> None:
        """Settings typed on the command line that a `path` leaves without effect; those of an option just give way."""
        if getattr(config, "path", None) is None:
            return
        place = ".".join(map(str, path))
        for name in getattr(config, "ignored_with_path", ()):
            default = type(config).model_fields[name].get_default(call_default_factory=True)
            if name not in body or body[name] == default:
                continue
            for typed in self.origins.typed_below((*path, name)):
                what = f"`{place}.{name}` has no effect: `{place}.path` excludes it"
                self.add(what, typed, f"remove it, or leave out {place}.path")

    def _references(self) -> None:
        from posttrain.pipeline.graph import check_references, resolve

        for problem in check_references(self.pairs):
            path = tuple(problem.where.split("."))
            reference = self._value(path)
            if isinstance(reference, str) and reference.partition(".")[0] in self.untyped:
                continue
            deleted = self._deleted(reference) if isinstance(reference, str) else None
            if deleted is not None and resolve(reference, self.pairs) is None:
                self.result.problems.append(self._orphan(path, reference, deleted))
                continue
            origin = self.origins.of(path)
            if origin.argument is None and problem.fix.startswith(f"write {problem.where}="):
                fix = instead(origin, path, problem.fix.partition("=")[2])
            else:
                fix = problem.fix
            self.result.problems.append(Problem(problem.what, origin.where, fix))

    def _launcher(self) -> None:
        """The launcher's settings of single stages, against the stages there are."""
        from posttrain.pipeline.graph import edges_of

        launcher, untyped = self.result.frame.launcher, self.untyped
        for section in ("stages", "dependencies"):
            for name in getattr(launcher, section):
                if name not in self.pairs and name not in untyped:
                    self._no_such(("launcher", section, name), f"the recipe has no stage `{name}`", list(self.pairs))
        for name, policies in launcher.dependencies.items():
            if name not in self.pairs:
                continue
            parents = list(dict.fromkeys(edge.stage for edge in edges_of(name, self.pairs).values()))
            for parent in policies:
                if parent not in parents:
                    what = f"stage `{name}` takes nothing from `{parent}`"
                    self._no_such(("launcher", "dependencies", name, parent), what, parents)

    def _no_such(self, path: KeyPath, what: str, names: list[str]) -> None:
        origin = self.origins.below(path)[0] if self.origins.below(path) else self.origins.of(path)
        guess = nearest(str(path[-1]), names)
        fix = f"write {guess} instead of {path[-1]}" if guess else f"the names are {among(names)}"
        self.add(what, origin.where, fix)

    def _deleted(self, reference: str) -> Argument | None:
        """The override that deleted the stage or source which a reference names."""
        parts = reference.split(".")
        paths: list[KeyPath] = [("stages", parts[0]), tuple(parts[:1]), tuple(parts[:2])]
        return next((found for path in paths if (found := self.origins.deleted(path)) is not None), None)

    def _orphan(self, path: KeyPath, reference: str, deleted: Argument) -> Problem:
        """The problem of an input whose stage was deleted; `path` is `stages.NAME.inputs.INPUT`, or a source's."""
        from posttrain.pipeline.graph import section_of, valid_references

        consumer = ".".join(map(str, path[1:-2] if path[0] == "stages" else path[:-2]))
        spec = self.pairs[consumer][0].inputs.get(str(path[-1]))
        others = valid_references(self.pairs, spec.type if spec else None)
        fitting = [other for other in others if not other.startswith(f"{consumer}.")]
        what = f"'{reference}' is the input {path[-1]} of stage {consumer}, but `{deleted.text}` removed it"
        # What the deleted stage took is the nearest to what it would have given.
        inputs = (*deleted.path, "inputs")
        taken = [self.origins.written((*inputs, name)) for name in self.origins.written(inputs) or ()]
        best = next((other for other in taken if other in fitting), fitting[0] if fitting else None)
        fix = f"write {'.'.join(map(str, path))}={best}, or ~{section_of(consumer)}" if best else "leave it out"
        return Problem(what, deleted.where, fix)

    def _value(self, path: KeyPath) -> Any:
        value: Any = self.data
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value
