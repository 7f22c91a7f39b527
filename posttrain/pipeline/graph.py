"""The graph of stages: edges come from `inputs:` references and from nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from posttrain.errors import Problem, RecipeError

if TYPE_CHECKING:
    from posttrain.pipeline.stage import Stage, StageConfig

    Stages = Mapping[str, tuple[Stage, StageConfig]]


@dataclass(frozen=True)
class Edge:
    """One input of a stage: the reference as written and what it resolves to."""

    input: str
    reference: str
    stage: str
    output: str


def is_source(name: str) -> bool:
    """Whether a stage name is one of a recipe's implicit sources: `model`, `models.X`, `data`, `datasets.X`."""
    return name in ("model", "data") or name.startswith(("models.", "datasets."))


def section_of(name: str) -> str:
    """Where a recipe has the settings of a stage."""
    return name if is_source(name) else f"stages.{name}"


def in_section(problems: Iterable[Problem], stage: Stage, name: str) -> list[Problem]:
    """Problems that a stage reports, with its settings named as in the recipe: the stage does not know its name."""
    from posttrain.config import explain

    return [explain.in_section(problem, stage.Config, section_of(name)) for problem in problems]


def resolve(reference: str, stages: Stages) -> tuple[str, str] | None:
    """Stage and output that a reference means, None when it means nothing.

    A bare stage name means its first output, unless another output has the same type: then it must be named.
    """
    if reference in stages:
        types = list(stages[reference][0].outputs.values())
        names = list(stages[reference][0].outputs)
        return (reference, names[0]) if names and types.count(types[0]) == 1 else None
    stage, _, output = reference.rpartition(".")
    if stage in stages and output in stages[stage][0].outputs:
        return stage, output
    return None


def valid_references(stages: Stages, type_: str | None = None) -> list[str]:
    """All references that name an output (of that artifact type), in their usual form."""
    found = []
    for name, (stage, _) in stages.items():
        for output, output_type in stage.outputs.items():
            if type_ is None or output_type == type_:
                bare = is_source(name) and len(stage.outputs) == 1
                found.append(name if bare else f"{name}.{output}")
    return found


def check_references(stages: Stages) -> list[Problem]:
    """Everything that is wrong with the stages' inputs, with the nearest valid reference; empty when all is well.

    Reports unknown stages, outputs, splits and input names, missing inputs, wrong artifact types and cycles. Sources
    that nobody uses are left out of a run, and so of this.
    """
    problems: list[Problem] = []
    used = {edge.stage for name in stages for edge in edges_of(name, stages).values()}
    for name, (stage, cfg) in stages.items():
        if is_source(name) and name not in used:
            continue
        for input_name, reference in cfg.inputs.items():
            problem = _check_input(name, stage, input_name, reference, stages)
            if problem is not None:
                problems.append(problem)
        for input_name, spec in stage.inputs.items():
            if input_name not in cfg.inputs and not spec.optional:
                problems.append(_missing_input(name, input_name, spec.type, stages))
    cycle = find_cycle(stages)
    if cycle is not None:
        problems.append(
            Problem(
                f"stages wait for each other: {' → '.join(cycle)}",
                f"{section_of(cycle[0])}.inputs",
                "let one of them take its input from an earlier stage",
            )
        )
    return problems


def _check_input(name: str, stage: Stage, input_name: str, reference: str, stages: Stages) -> Problem | None:
    where = f"{section_of(name)}.inputs.{input_name}"
    if input_name not in stage.inputs:
        known = ", ".join(stage.inputs) or "none"
        near = nearest(input_name, stage.inputs)
        fix = f"write {section_of(name)}.inputs.{near}" if near else f"remove it; stage {name} takes: {known}"
        return Problem(f"stage {name} ({stage.type}) has no input '{input_name}'; its inputs are: {known}", where, fix)
    wanted = stage.inputs[input_name].type
    found = resolve(reference, stages)
    if found is None:
        return _unknown_reference(reference, wanted, where, name, stages)
    given = stages[found[0]][0].outputs[found[1]]
    if given == wanted:
        return None
    others = [text for text in valid_references(stages, wanted) if not text.startswith(f"{name}.")]
    same_stage = [text for text in others if text.startswith(f"{found[0]}.")]
    what = f"'{reference}' is a {given}, but input {input_name} of stage {name} takes a {wanted}"
    return Problem(what, where, _how_to_get(wanted, where, same_stage or others))


def _unknown_reference(reference: str, wanted: str, where: str, name: str, stages: Stages) -> Problem:
    fitting = [text for text in valid_references(stages, wanted) if not text.startswith(f"{name}.")]
    if reference in stages:
        outputs = [f"{reference}.{output}" for output in stages[reference][0].outputs]
        return Problem(f"'{reference}' has several outputs", where, f"write {where}={_choices(outputs)}")
    stage, _, output = reference.rpartition(".")
    if stage in stages:
        outputs = list(stages[stage][0].outputs)
        near = nearest(output, outputs)
        what = f"'{reference}': {stage} has no output '{output}'; it has: {', '.join(outputs)}"
        return Problem(what, where, f"write {where}={f'{stage}.{near}' if near else _choices(fitting)}")
    near = nearest(reference, fitting) or nearest(reference, valid_references(stages))
    what = f"'{reference}' names no stage of this recipe"
    if near:
        return Problem(f"{what}; nearest: {near}", where, f"write {where}={near}")
    return Problem(what, where, _how_to_get(wanted, where, fitting))


def _missing_input(name: str, input_name: str, wanted: str, stages: Stages) -> Problem:
    fitting = [text for text in valid_references(stages, wanted) if not text.startswith(f"{name}.")]
    fix = _how_to_get(wanted, f"stages.{name}.inputs.{input_name}", fitting)
    return Problem(f"stage {name} lacks its input '{input_name}' (a {wanted})", f"stages.{name}.inputs", fix)


def _how_to_get(wanted: str, where: str, references: Iterable[str]) -> str:
    choice = _choices(references)
    return f"write {where}={choice}" if choice else f"add a stage that makes a {wanted}"


def _choices(references: Iterable[str]) -> str:
    return "|".join(references)


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like a word, None when none is near."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.55)
    return found[0] if found else None


def edges_of(name: str, stages: Stages) -> dict[str, Edge]:
    """The inputs of a stage that resolve, by input name in the order of the stage's declaration."""
    stage, cfg = stages[name]
    found = {}
    for input_name in stage.inputs:
        reference = cfg.inputs.get(input_name)
        target = resolve(reference, stages) if reference is not None else None
        if reference is not None and target is not None:
            found[input_name] = Edge(input_name, reference, *target)
    return found


def find_cycle(stages: Stages) -> list[str] | None:
    """Names along one cycle, first and last the same; None when there is none."""
    sorter = TopologicalSorter({name: [edge.stage for edge in edges_of(name, stages).values()] for name in stages})
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


class Graph:
    """Checked stages in execution order, without implicit sources that nobody uses.

    Attributes:
        stages: name to (stage, config), in execution order.
        edges: name to its resolved inputs.
        order: names in execution order; among stages that could run next, the one declared first.

    Raises:
        RecipeError: with everything `check_references` found.
    """

    def __init__(self, stages: Stages) -> None:
        problems = check_references(stages)
        if problems:
            raise RecipeError(problems=problems)
        edges = {name: edges_of(name, stages) for name in stages}
        used = {edge.stage for inputs in edges.values() for edge in inputs.values()}
        kept = [name for name in stages if name in used or not is_source(name)]
        self.edges = {name: edges[name] for name in kept}
        self.order = self._sorted(kept)
        self.stages = {name: stages[name] for name in self.order}

    def _sorted(self, names: list[str]) -> list[str]:
        position = {name: index for index, name in enumerate(names)}
        sorter = TopologicalSorter({name: self.parents(name) for name in names})
        sorter.prepare()
        ready: list[str] = []
        order = []
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=position.__getitem__)
            order.append(ready.pop(0))
            sorter.done(order[-1])
        return order

    def parents(self, name: str) -> list[str]:
        """Stages whose outputs a stage takes."""
        return list(dict.fromkeys(edge.stage for edge in self.edges[name].values()))

    def ancestors(self, name: str) -> set[str]:
        """All stages that a stage needs, directly or not."""
        found: set[str] = set()
        waiting = self.parents(name)
        while waiting:
            parent = waiting.pop()
            if parent not in found:
                found.add(parent)
                waiting += self.parents(parent)
        return found

    def descendants(self, name: str) -> set[str]:
        """All stages that need a stage, directly or not."""
        return {other for other in self.order if name in self.ancestors(other)}

    def select(self, from_: str | None = None, until: str | None = None, only: str | None = None) -> set[str]:
        """The stages that `--from`, `--until` and `--only` leave: S and what needs it, S and what it needs, S alone.

        Raises:
            RecipeError: no such stage, or `--only` together with one of the others.
        """
        if only is not None and (from_ is not None or until is not None):
            raise RecipeError("--only cannot be used with --from or --until", fix="give one of them")
        for flag, name in (("--from", from_), ("--until", until), ("--only", only)):
            if name is not None:
                self.require(name, flag)
        if only is not None:
            return {only}
        selected = set(self.order)
        if from_ is not None:
            selected &= {from_} | self.descendants(from_)
        if until is not None:
            selected &= {until} | self.ancestors(until)
        if not selected:
            raise RecipeError(f"--from {from_} --until {until} leaves no stage", fix=f"{until} does not need {from_}")
        return selected

    def require(self, name: str, flag: str) -> None:
        """Raise RecipeError unless there is a stage of that name."""
        if name not in self.stages:
            near = nearest(name, self.order)
            fix = f"write {flag} {near}" if near else f"stages are: {', '.join(self.order)}"
            raise RecipeError(f"{flag}: no stage '{name}' in this recipe", fix=fix)
