"""What a pydantic field takes, in words, and pydantic's errors as problems a user can act on."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from posttrain.config.documents import KeyPath
from posttrain.config.origins import Origin, Origins
from posttrain.config.suggest import among, nearest
from posttrain.errors import Problem

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SECTION = "a section of keys and values"
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most", "multiple_of": "a multiple of"}


def type_words(annotation: Any) -> str:
    """An annotation in words: `int | None` is "a whole number or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_words(argument) for argument in arguments))
    if origin in (list, tuple, set, frozenset):
        inner = [argument for argument in arguments if argument is not Ellipsis]
        return f"a list (each {type_words(inner[0])})" if inner else "a list"
    if origin is dict or isinstance(annotation, type) and issubclass(annotation, dict | BaseModel):
        return _SECTION
    return _WORDS.get(annotation, "a value" if annotation is Any else getattr(annotation, "__name__", str(annotation)))


def field_words(info: FieldInfo) -> str:
    """What a field takes: its type in words with its bounds."""
    words, bounds = type_words(info.annotation), bounds_words(info)
    return f"{words.removesuffix(' or null')}{bounds}, or null" if words.endswith(" or null") else words + bounds


def bounds_words(info: FieldInfo) -> str:
    """The bounds of a field, with a leading space, empty if it has none."""
    found = []
    for constraint in info.metadata:
        for name, words in _BOUNDS.items():
            if (bound := getattr(constraint, name, None)) is not None:
                found.append(f"{words} {bound:g}" if isinstance(bound, float) else f"{words} {bound}")
        if (pattern := getattr(constraint, "pattern", None)) is not None:
            found.append(f"matching {pattern}")
    return f" {' and '.join(found)}" if found else ""


def literals(annotation: Any) -> list[str]:
    """The fixed options of an annotation, also within a union or `Annotated`."""
    if get_origin(annotation) is Literal:
        return [str(option) for option in get_args(annotation)]
    return [option for argument in get_args(annotation) for option in literals(argument)]


def show_value(value: Any) -> str:
    """A value as YAML or an override would have it, cut when long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        text = f"[{','.join(show_value(item) for item in value)}]"
    else:
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def at(model: type[BaseModel], path: KeyPath, data: Any = None) -> tuple[Any, FieldInfo | None]:
    """What may stand at a key path below a model: its annotation, and the field if the path names one.

    Args:
        data: what stands there; its `type` and the like decide between the sections that a union names.
    """
    annotation: Any = model
    info: FieldInfo | None = None
    for part in path:
        info = None
        section = section_model(annotation, data)
        data = _below(data, part)
        if section is not None and part in section.model_fields:
            info = section.model_fields[str(part)]
            annotation = info.annotation
            continue
        containers = _members(annotation, lambda found: get_origin(found) in (dict, list, tuple))
        inner = get_args(containers[0]) if containers else ()
        annotation = (inner[-1] if get_origin(containers[0]) is dict else inner[0]) if inner else None
    return annotation, info


def _below(data: Any, part: str | int) -> Any:
    if isinstance(data, Mapping):
        return data.get(part)
    return data[part] if isinstance(data, list | tuple) and isinstance(part, int) and part < len(data) else None


def _members(annotation: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """The annotation, or the members of the union it is, that are wanted."""
    if wanted(annotation):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [member for argument in get_args(annotation) for member in _members(argument, wanted)]
    return []


def section_model(annotation: Any, data: Any = None) -> type[BaseModel] | None:
    """The model behind an annotation that is a section, None for plain values.

    Of a union told apart by a key it is the one that `data` asks for, or the first.
    """
    models = _members(annotation, lambda found: isinstance(found, type) and issubclass(found, BaseModel))
    name = discriminator(annotation)
    if name is not None and isinstance(data, Mapping):
        asked = [model for model in models if str(data.get(name)) in literals(model.model_fields[name].annotation)]
        models = asked or models
    return models[0] if models else None


def discriminator(annotation: Any) -> str | None:
    """The key that tells the members of a union of sections apart; None for all else."""
    if get_origin(annotation) is not Annotated:
        return None
    found = [item.discriminator for item in annotation.__metadata__ if isinstance(item, FieldInfo)]
    return next((name for name in found if isinstance(name, str)), None)


def keys_at(model: type[BaseModel], path: KeyPath, data: Any = None) -> list[str]:
    """The keys that may stand at a path below a model; see `at`."""
    annotation, _ = at(model, path, data)
    for part in path:
        data = _below(data, part)
    section = section_model(annotation, data)
    return list(section.model_fields) if section is not None else []


def instead(origin: Origin, path: KeyPath, value: str) -> str:
    """The correct form of a setting, as an override or as a line of YAML, whichever the user wrote."""
    if origin.argument is None:
        return f"write {path[-1]}: {value}"
    return f"write {'.'.join(map(str, path))}={value}"


def in_section(problem: Problem, model: type[BaseModel], section: str) -> Problem:
    """A problem in a stage's own words (`lr`, `lr=1e-4`) with its settings as a recipe names them.

    Stages do not know what a recipe calls them; this is where `stages.NAME.` comes from. Sources say `data.` and
    `model.` of themselves, which is what a recipe calls the first of them: it becomes `datasets.NAME.`, `models.NAME.`.
    """
    group = section.partition(".")[0]
    problem = Problem(*(_renamed(text, model, group, section) for text in (problem.what, problem.where, problem.fix)))
    name = problem.where.partition(".")[0]
    where = f"{section}.{problem.where}" if name in model.model_fields else problem.where
    return Problem(problem.what, where, _qualified(problem.fix, model, section))


def _renamed(text: str, model: type[BaseModel], group: str, section: str) -> str:
    """Text in which the settings of one of several sources have its own section."""
    first = {"datasets": "data", "models": "model"}.get(group)
    if first is None:
        return text
    names = "|".join(map(re.escape, model.model_fields))
    return re.sub(rf"(?<![\w.@/~-]){first}\.(?=(?:{names})\b)", f"{section}.", text)


def _qualified(text: str, model: type[BaseModel], section: str) -> str:
    """Text in which every `setting=` of the model, and `~inputs.NAME`, can be typed behind `posttrain run RECIPE`."""
    if not section:
        return text
    names = "|".join(map(re.escape, model.model_fields))
    text = re.sub(rf"(?<![\w.@/~-])(?=(?:{names})(?:\.\w+)*=)", f"{section}.", text)
    return text.replace("~inputs.", f"~{section}.inputs.")


def problems_of(
    error: ValidationError, model: type[BaseModel], section: KeyPath, data: Any, origins: Origins, name: str = ""
) -> list[Problem]:
    """Every error of one model as a problem.

    Args:
        section: key path of the model's data in the recipe.
        data: what was validated; used to leave pydantic's names of union members out of the paths.
        name: what to give `posttrain show` to see the valid keys.
    """
    by_path: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        by_path.setdefault(_path_within(item["loc"], data, absent=item["type"] == "missing"), []).append(item)
    return [_problem(path, items, model, section, data, origins, name) for path, items in by_path.items()]


def _path_within(location: tuple[str | int, ...], data: Any, absent: bool) -> KeyPath:
    """pydantic's location without the names it adds for members of a union; `absent`: its last part is not there."""
    path: list[str | int] = []
    current = data
    for position, part in enumerate(location):
        if isinstance(current, Mapping) and (part in current or absent and position == len(location) - 1):
            path.append(part)
            current = current.get(part)
        elif isinstance(current, list | tuple) and isinstance(part, int) and part < len(current):
            path.append(part)
            current = current[part]
    return tuple(path)


def _problem(
    path: KeyPath, items: list[Any], model: type[BaseModel], section: KeyPath, data: Any, origins: Origins, name: str
) -> Problem:
    full = (*section, *path)
    dotted = ".".join(map(str, full))
    kind = items[0]["type"]
    origin = origins.of(full)
    if kind == "extra_forbidden":
        hidden = ("type", "inputs") if section and section[0] != "stages" and len(path) == 1 else ()
        valid = [key for key in keys_at(model, path[:-1], data) if key not in hidden]
        return _unknown_key(path, full, valid, origins, name)
    annotation, info = at(model, path, data)
    value = items[0]["input"]
    if kind.startswith("union_tag_") or discriminator(annotation) and not isinstance(value, Mapping | BaseModel):
        return _wrong_member(full, annotation, value, origins)
    wanted = (field_words(info) if info is not None else type_words(annotation)) if annotation else items[0]["msg"]
    doc = f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
    if kind == "missing":
        return Problem(f"`{dotted}` is missing: {wanted}{doc}", origin.where, f"write {dotted}=VALUE")
    if kind in ("value_error", "assertion_error"):
        rule, _, example = items[0]["msg"].partition(", ")[2].partition(", e.g. ")
        fix = f"write {_qualified(example, model, '.'.join(map(str, section)))}" if example else ""
        return Problem(f"{dotted}: {rule}", origins.to_blame(full, items[0]["msg"]).where, fix)
    what = f"`{dotted}` should be {wanted}, not {show_value(value)!r}{doc}"
    if isinstance(value, dict | list):
        # A scalar in a file that an override turned into a section: the override is to blame.
        origin = _whole(origins, full)
    if wanted == _SECTION:
        keys = keys_at(model, path, data)
        fix = f"write {dotted}.KEY=VALUE{f'; the keys are {among(keys)}' if keys else ''}"
        return Problem(what, origin.where, f"write ~{dotted} to delete it" if value is None else fix)
    return Problem(what, origin.where, instead(origin, full, _example(info, value)) if path else "")


def _wrong_member(full: KeyPath, annotation: Any, value: Any, origins: Origins) -> Problem:
    """A section that does not say, or not rightly, which of several kinds it is."""
    tag = discriminator(annotation) or "type"
    members = _members(annotation, lambda found: isinstance(found, type) and issubclass(found, BaseModel))
    kinds = [kind for member in members for kind in literals(member.model_fields[tag].annotation)]
    dotted, given = ".".join(map(str, full)), value.get(tag) if isinstance(value, Mapping) else None
    what = f"`{dotted}.{tag}` should be one of {', '.join(kinds)}, not {show_value(given)!r}"
    if not isinstance(value, Mapping):
        what = f"`{dotted}` should be a section with `{tag}`: one of {', '.join(kinds)}; not {show_value(value)!r}"
    elif given is None:
        what = f"`{dotted}.{tag}` is missing: one of {', '.join(kinds)}"
    near = nearest(str(given if isinstance(value, Mapping) else value), kinds) or "|".join(kinds)
    origin = _whole(origins, full)
    if isinstance(value, Mapping):
        return Problem(what, origin.where, instead(origin, (*full, tag), near))
    return Problem(what, origin.where, instead(origin, full, f"{{{tag}: {near}}}"))


def _whole(origins: Origins, path: KeyPath) -> Origin:
    """The place to blame for a section: the last override in it, else where it begins."""
    typed = [origin for origin in origins.below(path) if origin.argument is not None]
    return typed[-1] if typed else origins.of(path)


def _example(info: FieldInfo | None, value: Any) -> str:
    if info is None:
        return "VALUE"
    options = literals(info.annotation)
    if options:
        return nearest(str(value), options) or (str(info.default) if info.default in options else options[0])
    if not info.is_required() and info.default is not None and info.default_factory is None:
        return show_value(info.default)
    if info.default is None and not info.is_required() and show_value(value) in ("none", "None", "~", ""):
        return "null"
    number = type_words(info.annotation).startswith(("a whole", "a number"))
    return f"N with N {field_words(info).removesuffix(', or null')}" if number else "VALUE"


def _unknown_key(path: KeyPath, full: KeyPath, valid: list[str], origins: Origins, name: str) -> Problem:
    key = str(path[-1])
    guess = nearest(key, valid)
    origin = origins.of(full)
    place = ".".join(map(str, full[:-1]))
    what = f"{f'`{place}`' if place else 'the recipe'} has no key `{key}`"
    if guess is not None:
        if origin.argument is None or len(origin.argument.path) < len(full):
            return Problem(what, origin.where, f"write {guess} instead of {key}")
        return Problem(what, origin.where, f"write {renamed(origin, len(full) - 1, guess)}")
    fix = f"the keys are {among(valid)}" + (f"; `posttrain show {name}` explains them" if name else "")
    return Problem(what, origin.where, fix)


def renamed(origin: Origin, position: int, name: str) -> str:
    """The override behind an origin with one part of its key replaced."""
    assert origin.argument is not None
    parts = [str(part) for part in origin.argument.path]
    if position < len(parts):
        parts[position] = name
        return origin.argument.with_key(".".join(parts))
    return ".".join([*parts, name])
