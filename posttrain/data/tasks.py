"""Generated tasks of the package `reasoning_gym`: which there are, their problems, and the split by ranges of seeds.

Problem `index` of a generator made with `seed` is drawn from `Random(seed + index)`: generators whose seeds differ by
less than their size share problems. Training and held-out problems therefore come from ranges of seeds that cannot
meet, and because two seeds may still draw the same small problem, a question occurs once over both splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from posttrain.data.difficulty import refused_levels, variants
from posttrain.data.sections import EASY_TASKS, GymTasks
from posttrain.errors import Problem, RecipeError
from posttrain.rewards.gym import generator_of, make_generator

PACKAGE = "reasoning_gym"
TASK = "task"
"""Field of a row: the settings that `problem_of` makes its problem from again, and reward `gym` scores answers by."""

SEEDS_PER_RUN, HELDOUT_SEEDS = 1 << 24, 1 << 23
"""Seeds that belong to one seed of a run; of these, the held-out problems' begin in the middle."""

EASY_BYTES = 129
"""`typical_bytes` of the default tasks, so that a plan with them need not import the package (a second, matplotlib)."""

TRIES = 20
"""Problems drawn for each that is wanted, at most: small generators repeat themselves."""

GeneratorKey = tuple[str, str, int, int]


@dataclass(frozen=True)
class TaskProblem:
    """One generated problem.

    Attributes:
        task: name, settings, seed, size and index of its generator, and its difficulty if it has one; JSON-able.
    """

    question: str
    answer: str
    task: dict[str, Any]

    @property
    def id(self) -> str:
        level = f"@{self.task['difficulty']}" if "difficulty" in self.task else ""
        return f"{self.task['name']}{level}/{self.task['seed'] + self.task['index']}"


@dataclass(frozen=True)
class Problems:
    """Both splits; `duplicates`: problems that were drawn and left out because their question had occurred."""

    train: list[TaskProblem]
    heldout: list[TaskProblem]
    duplicates: int


def require_package(where: str) -> None:
    """Raises RecipeError naming the extra to install, if `reasoning_gym` is not there."""
    if find_spec(PACKAGE) is None:
        raise RecipeError(
            f"the package {PACKAGE} is not installed; it makes and scores the tasks",
            where=where,
            fix="pip install reasoning-gym",
        )


def package_version() -> str:
    """Version of `reasoning_gym`: it decides the problems."""
    return metadata.version(PACKAGE)


def check_tasks(tasks: GymTasks, where: str) -> None:
    """Raises RecipeError: no package, an unknown task, a level that it does not have, or settings that it refuses."""
    require_package(where)
    if _is_easy(tasks):
        return
    if problems := _refused(tasks.model_dump_json(), where):
        raise RecipeError(problems=list(problems))


def draw(tasks: GymTasks, heldout_fraction: float, seed: int) -> Problems:
    """`tasks.size` problems in all, from every task in turn, `heldout_fraction` of them held out.

    Fewer if the generators cannot make as many different questions. The same for the same seed, whatever the machine.
    """
    held = heldout_size(tasks.size, heldout_fraction)
    first = (seed % (1 << 32)) * SEEDS_PER_RUN
    heldout, doubled = _distinct(tasks, held, first + HELDOUT_SEEDS, set())
    train, doubled_too = _distinct(tasks, tasks.size - held, first, {problem.question for problem in heldout})
    if held and len(train) < tasks.size - held:
        # The held-out problems came first and took more than their share of all that there are.
        heldout = heldout[: heldout_size(len(train) + len(heldout), heldout_fraction)]
        train, doubled_too = _distinct(tasks, tasks.size - held, first, {problem.question for problem in heldout})
    return Problems(train, heldout, doubled + doubled_too)


def heldout_size(size: int, fraction: float) -> int:
    """Problems of `size` that are held out: one at least, and not all; none with a fraction of 0."""
    return min(max(1, round(size * fraction)), size - 1) if fraction else 0


def problem_of(task: dict[str, Any]) -> dict[str, Any]:
    """The problem with its metadata, as `reasoning_gym` makes it: `question`, `answer`, `metadata`."""
    return generator_of(task)[task["index"]]


def typical_bytes(tasks: GymTasks) -> int:
    """Mean size of question and answer as plain text, for estimates; what the answer's format adds is left out."""
    return EASY_BYTES if _is_easy(tasks) else _typical_bytes(tasks.model_dump_json())


def _is_easy(tasks: GymTasks) -> bool:
    return tasks.tasks == EASY_TASKS and tasks.difficulty is None


def _distinct(tasks: GymTasks, count: int, first_seed: int, taken: set[str]) -> tuple[list[TaskProblem], int]:
    """`count` problems with different questions, none of them `taken`, and how many were left out."""
    seen = set(taken)
    found: list[TaskProblem] = []
    doubled = 0
    for problem in _rotating(tasks, count, first_seed):
        if len(found) == count:
            break
        if problem.question in seen:
            doubled += 1
            continue
        seen.add(problem.question)
        found.append(problem)
    return found, doubled


def _rotating(tasks: GymTasks, count: int, first_seed: int) -> Iterator[TaskProblem]:
    """Problems of every task and level in turn, `TRIES * count` in all.

    Each level has seeds of its own: with the same ones a task draws the same problems at several levels.
    """
    made = variants(tasks)
    size = max(1, TRIES * count // len(made))
    for index in range(size):
        for number, variant in enumerate(made):
            seed = first_seed + number // len(tasks.tasks) * size
            task = {**variant.task, "seed": seed, "size": size, "index": index}
            entry = problem_of(task)
            yield TaskProblem(entry["question"].strip(), str(entry["answer"]), task)


@lru_cache(maxsize=8)
def _typical_bytes(settings: str) -> int:
    tasks = GymTasks.model_validate_json(settings)
    few = draw(tasks.model_copy(update={"size": 8 * len(variants(tasks))}), 0.0, 0).train
    return sum(len(f"User: {found.question}\n\nAssistant: {found.answer}") for found in few) // len(few)


@lru_cache(maxsize=8)
def _refused(settings: str, where: str) -> tuple[Problem, ...]:
    from reasoning_gym.factory import DATASETS

    from posttrain.config.suggest import nearest

    tasks = GymTasks.model_validate_json(settings)
    problems = []
    for name in tasks.tasks:
        if name not in DATASETS:
            near, at = nearest(name, DATASETS), f"{where}.gym.tasks.{name}"
            problems.append(Problem(f"{PACKAGE} has no task {name!r}", at, f"did you mean {near}?" if near else ""))
    there = tasks.model_copy(update={"tasks": {name: tasks.tasks[name] for name in tasks.tasks if name in DATASETS}})
    levels = [] if tasks.difficulty is None else refused_levels(there, where)
    return tuple(problems + (levels or _refused_settings(there, where)))


def _refused_settings(tasks: GymTasks, where: str) -> list[Problem]:
    from reasoning_gym.factory import DATASETS

    problems = []
    for variant in variants(tasks):
        try:
            make_generator(variant.name, json.dumps(variant.settings, sort_keys=True), 0, 1)
        except (AssertionError, TypeError, ValueError) as error:
            known = ", ".join(sorted(set(DATASETS[variant.name][1].__dataclass_fields__) - {"seed", "size"}))
            said = str(error).strip() or type(error).__name__
            level = "" if variant.level is None else f" at level {variant.level}"
            what = f"task {variant.name} refuses its settings{level}: {said}"
            problems.append(Problem(what, f"{where}.gym.tasks.{variant.name}", f"its settings are: {known}"))
    return problems
