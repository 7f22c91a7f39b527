"""The difficulty dial of generated tasks: `reasoning_gym`'s own curricula, one level at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.data.sections import GymTasks
from posttrain.errors import Problem


@dataclass(frozen=True)
class Variant:
    """A task with the settings of its generator; `level` is None without a curriculum."""

    name: str
    settings: dict[str, Any]
    level: int | None = None

    @property
    def task(self) -> dict[str, Any]:
        """The fields of a row's `task` that every problem of this variant has."""
        level = {} if self.level is None else {"difficulty": self.level}
        return {"name": self.name, "settings": self.settings, **level}


def variants(tasks: GymTasks) -> list[Variant]:
    """Every task at every level, levels outside, so that problems in turn come from all tasks first.

    Needs the tasks and levels to exist: see `refused_levels`.
    """
    if tasks.difficulty is None:
        return [Variant(name, settings) for name, settings in tasks.tasks.items()]
    return [
        Variant(name, {**level_settings(name, level), **settings}, level)
        for level in tasks.difficulty
        for name, settings in tasks.tasks.items()
    ]


def level_settings(name: str, level: int) -> dict[str, Any]:
    """The settings that a task's curriculum has at a level; attributes with fewer levels are at their last."""
    from reasoning_gym.factory import create_curriculum

    curriculum = create_curriculum(name)
    for attribute, known in curriculum.attributes.items():
        curriculum.set_attr_level(attribute, min(level, len(known.levels) - 1))
    made = curriculum.generate_configuration()
    return {field: getattr(made, field) for known in curriculum.attributes.values() for field in _fields(known)}


def refused_levels(tasks: GymTasks, where: str) -> list[Problem]:
    """What is wrong with the levels of tasks whose names exist: no curriculum, none so high, or two that are equal."""
    from reasoning_gym.factory import has_curriculum

    problems = []
    for name, settings in tasks.tasks.items():
        at = f"{where}.gym.tasks.{name}"
        if not has_curriculum(name):
            fix = f"leave it out, or data.gym.difficulty=null; tasks with levels are e.g. {', '.join(_examples(tasks))}"
            problems.append(Problem(f"task {name} has no curriculum, and so no levels of difficulty", at, fix))
            continue
        top = top_level(name)
        if beyond := [level for level in tasks.difficulty or () if level > top]:
            fix = f"its levels are 0 to {top}"
            problems.append(Problem(f"task {name} has no level {beyond[0]}", f"{where}.gym.difficulty", fix))
        elif equal := _equal_levels(name, settings, tasks.difficulty or ()):
            what = f"task {name} is the same at levels {equal[0]} and {equal[1]}: its settings here decide everything"
            problems.append(Problem(what, at, "leave a setting to the level, or the level out"))
    return problems


def top_level(name: str) -> int:
    """The highest level at which something of the task still grows."""
    from reasoning_gym.factory import create_curriculum

    return max((len(known.levels) for known in create_curriculum(name).attributes.values()), default=1) - 1


def _equal_levels(name: str, settings: dict[str, Any], levels: tuple[int, ...]) -> tuple[int, int] | None:
    made = [(level, {**level_settings(name, level), **settings}) for level in levels]
    pairs = ((low, high) for index, low in enumerate(made) for high in made[index + 1 :])
    return next(((low[0], high[0]) for low, high in pairs if low[1] == high[1]), None)


def _examples(tasks: GymTasks) -> list[str]:
    from reasoning_gym.factory import has_curriculum

    return [name for name in tasks.tasks if has_curriculum(name)] or ["chain_sum", "leg_counting", "products"]


def _fields(attribute: Any) -> tuple[str, ...]:
    """Settings that an attribute of a curriculum decides: two for a range, one for a scalar."""
    if hasattr(attribute, "field_name"):
        return (attribute.field_name,)
    return (attribute.lower_field_name, attribute.upper_field_name)
