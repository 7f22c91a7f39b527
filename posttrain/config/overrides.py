"""What the user typed after the recipe: parsed by Hydra's grammar, sorted into scale, group choices and values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException

from posttrain.config.compose import Repository, merge_into
from posttrain.config.documents import KeyPath
from posttrain.config.suggest import among, nearest
from posttrain.errors import Problem

PACKAGES = {
    "model": ("model", "models."),
    "data": ("data", "datasets."),
    "stage": (None, "stages."),
    "engine": ("engine", None),
    "launcher": ("launcher", None),
    "tracker": ("tracker", None),
    "debug": ("debug", None),
}
"""Group to the section it fills by itself, and the prefix of the sections it fills as `group@PREFIX.NAME`."""


@dataclass(frozen=True)
class Argument:
    """One override with where it was written: on the command line as typed, or in a scale of the recipe."""

    text: str
    where: str
    parsed: Override

    @property
    def key(self) -> str:
        return self.parsed.key_or_group

    @property
    def path(self) -> KeyPath:
        """The key as a path; list positions as numbers."""
        return split_key(self.key)

    @property
    def section(self) -> KeyPath:
        """The section that a group choice fills."""
        return tuple((self.parsed.package or self.key).split("."))

    @property
    def typed_value(self) -> str:
        """What stands after the first `=`."""
        return self.text.partition("=")[2]

    def with_key(self, key: str) -> str:
        """The argument with another key, quoted for a shell."""
        return quoted(f"{key}={self.typed_value}")


@dataclass
class Sorted:
    """Overrides by what they do, in the order in which they were given."""

    choices: dict[str, Argument] = field(default_factory=dict)
    values: list[Argument] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def split_key(key: str) -> KeyPath:
    """`a.b[0].c` as ("a", "b", 0, "c")."""
    parts = re.findall(r"\[(\d+)\]|([^.\[\]]+)", key)
    return tuple(int(number) if number else name for number, name in parts)


def quoted(argument: str) -> str:
    """An argument as one types it, quoted when the shell would take it apart."""
    return argument if re.fullmatch(r"[\w@%+=:,./~-]*", argument) and argument[:1] != "~" else _shell(argument)


def _shell(argument: str) -> str:
    return argument if re.fullmatch(r"~[\w.@-]+", argument) else shlex.quote(argument)


# Hydra's own error, and what its parser stumbles over in text such as `=`.
UNREADABLE = (HydraException, IndexError, AttributeError)


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def parse(texts: Iterable[tuple[str, str]]) -> tuple[list[Argument], list[Problem]]:
    """Parse (override, where it was written) pairs; a bad one becomes a problem and the rest go on."""
    arguments, problems = [], []
    for text, where in texts:
        if not text.strip():
            problems.append(Problem("an override is empty", where or "''", "remove it"))
            continue
        try:
            parsed = _parser().parse_override(text)
        except UNREADABLE as error:
            problems.append(_unparsed(text, where, error))
            continue
        if not parsed.key_or_group:
            # What the parser makes of `=` depends on what it has read before.
            problems.append(_unparsed(text, where, ValueError("it has no key")))
        elif parsed.is_sweep_override():
            problems.append(_sweep(text, where, parsed))
        elif parsed.is_hydra_override() or parsed.key_or_group == "hydra":
            what = f"`{text}` sets Hydra itself, which only composes the recipe here"
            problems.append(Problem(what, where, "remove it; `posttrain run --help` lists what a run can be told"))
        elif "_target_" in split_key(parsed.key_or_group):
            problems.append(refused_target(where))
        else:
            arguments.append(Argument(text, where, parsed))
    return arguments, problems


def refused_target(where: str) -> Problem:
    """The problem of a recipe that tries to name code."""
    fix = "remove `_target_`; a stage's `type` names its code (`posttrain list stages`)"
    return Problem("`_target_` is refused: a recipe is data and cannot name code to run", where, fix)


def _unparsed(text: str, where: str, error: Exception) -> Problem:
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        what = f"`{text}` is not an override: it has no `=`"
        return Problem(what, where, f"write {quoted(text)}=VALUE without spaces")
    for better in (f'{key}="{value}"', f"{key}='{value}'", re.sub(r"\[(\d+)\]", r".\1", text)):
        if value and _reads(better):
            fix = f"write {better}" if better == quoted(better) else f"quote it: write {_shell(better)}"
            return Problem(f"`{text}` cannot be read as key=value", where, fix)
    reason = str(error).splitlines()[0]
    return Problem(f"`{text}` cannot be read as key=value: {reason}", where, "write KEY=VALUE, e.g. seed=1")


def _reads(text: str) -> bool:
    try:
        return not _parser().parse_override(text).is_sweep_override()
    except UNREADABLE:
        return False


def _sweep(text: str, where: str, parsed: Override) -> Problem:
    what = f"`{text}` lists several values, and one run takes one"
    if parsed.value_type == ValueType.SIMPLE_CHOICE_SWEEP and parsed.key_or_group not in ("scale", *PACKAGES):
        key, _, value = text.partition("=")
        return Problem(what, where, f"write {_shell(f'{key}=[{value}]')} for a list, or -m for a run with each value")
    return Problem(what, where, "give one value, or -m for a run with each")


def take_scale(arguments: list[Argument]) -> tuple[Argument | None, list[Argument]]:
    """The last `scale=NAME` and the other arguments."""
    scales = [argument for argument in arguments if argument.key == "scale" and not argument.parsed.is_delete()]
    chosen = scales[-1] if scales and scales[-1].parsed.value() is not None else None
    return chosen, [argument for argument in arguments if argument not in scales]


def sort(arguments: list[Argument], repository: Repository, known: dict[str, Any]) -> Sorted:
    """Tell group choices from values and check the choices. `known`: what the recipe's own defaults choose."""
    result = Sorted()
    for argument in arguments:
        parsed = argument.parsed
        if parsed.key_or_group not in PACKAGES or (parsed.package is None and isinstance(parsed.value(), dict)):
            if parsed.package is not None:
                result.problems.append(_unknown_group(argument))
            else:
                result.values.append(argument)
            continue
        if parsed.package == PACKAGES[parsed.key_or_group][0]:
            parsed.package = None
        problem = _check_choice(argument, repository, known)
        if problem is not None:
            result.problems.append(problem)
            continue
        key = f"{parsed.key_or_group}@{parsed.package}" if parsed.package else parsed.key_or_group
        if not parsed.is_delete():
            # Hydra wants a `+` exactly when the recipe does not choose from that group yet; the user need not know.
            parsed.type = OverrideType.CHANGE if key in known else OverrideType.ADD
            parsed._value = _option(argument)
        result.choices[key] = argument
    return result


def _option(argument: Argument) -> str:
    return argument.typed_value.strip("'\"").removesuffix(".yaml")


def _unknown_group(argument: Argument) -> Problem:
    group, package = argument.key, argument.parsed.package
    guess = nearest(group, PACKAGES)
    fix = f"write {argument.with_key(f'{guess}@{package}')}" if guess else f"the groups are {among(PACKAGES)}"
    return Problem(f"there is no group `{group}`", argument.where, fix)


def _check_choice(argument: Argument, repository: Repository, known: dict[str, Any]) -> Problem | None:
    parsed, group = argument.parsed, argument.key
    own, prefix = PACKAGES[group]
    key = f"{group}@{parsed.package}" if parsed.package else group
    if parsed.is_delete():
        if group == "stage" and parsed.package:
            what = f"`{argument.text}` would leave the stage without a type"
            return Problem(what, argument.where, f"write ~{parsed.package}")
        return None if key in known else Problem(f"the recipe chooses nothing for `{key}`", argument.where, "remove it")
    if parsed.package is None:
        placed = own is not None
    else:
        placed = prefix is not None and re.fullmatch(rf"{re.escape(prefix)}\w+", parsed.package) is not None
    if not placed:
        place = f"{group}@{prefix}NAME" if prefix else group
        usual = f"{own}=OPTION or {place}=OPTION" if own and prefix else f"{place}=OPTION"
        name = (parsed.package or "").rpartition(".")[2]
        guess = f"write {argument.with_key(f'{group}@{prefix}{name}')}" if prefix and name else f"write {usual}"
        return Problem(f"`{key}` does not say where the {group} goes: {usual}", argument.where, guess)
    option = _option(argument)
    options = repository.get_group_options(group)
    if option in options:
        return None
    guess = nearest(option, options)
    section = parsed.package or own
    if re.search(r"[/\\]|^\.", option) and group in ("model", "data"):
        fix = f"write {quoted(f'{section}.path={argument.typed_value}')} to use a folder or file of your own"
    else:
        fix = f"write {key}={guess}" if guess else f"write {key}=OPTION with one of these"
    return Problem(f"`{option}` is not among the options of {group}: {among(options)}", argument.where, fix)


def apply_values(data: dict[str, Any], arguments: list[Argument]) -> list[Problem]:
    """Write the value overrides into the composed recipe, in order; what cannot be written comes back as problems."""
    found = [_delete(data, item) if item.parsed.is_delete() else _set(data, item) for item in arguments]
    return [problem for problem in found if problem is not None]


def _set(data: dict[str, Any], argument: Argument) -> Problem | None:
    parent: Any = data
    path = argument.path
    for position, part in enumerate(path):
        if isinstance(parent, list) and not (isinstance(part, int) and part < len(parent)):
            key = ".".join(map(str, path[:position]))
            what = f"`{key}` is a list of {len(parent)}, so there is no `{argument.key}` to set"
            return Problem(what, argument.where, f"write {quoted(f'{key}=[…]')} to give the whole list")
        if position == len(path) - 1:
            break
        inner = parent.get(part) if isinstance(parent, dict) else parent[part]
        if not isinstance(inner, dict | list):
            parent[part] = {}
        parent = parent[part]
    value = argument.parsed.value()
    if isinstance(parent, dict) and isinstance(value, dict):
        merge_into(parent, {path[-1]: value})
    else:
        parent[path[-1]] = value
    return None


def _delete(data: dict[str, Any], argument: Argument) -> Problem | None:
    parent: Any = data
    path = argument.path
    for position, part in enumerate(path):
        keys = (
            list(parent) if isinstance(parent, dict) else list(range(len(parent))) if isinstance(parent, list) else []
        )
        if part not in keys:
            guess = nearest(str(part), [str(key) for key in keys])
            fix = f"write ~{'.'.join([*map(str, path[:position]), guess])}" if guess else "remove it"
            return Problem(f"there is nothing to delete at `{argument.key}`", argument.where, fix)
        if position < len(path) - 1:
            parent = parent[part]
    wanted = argument.parsed.value()
    if wanted is not None and parent[path[-1]] != wanted:
        what = f"`{argument.key}` is not {wanted!r}, so `{argument.text}` deletes nothing"
        return Problem(what, argument.where, f"write ~{argument.key}")
    del parent[path[-1]]
    return None
