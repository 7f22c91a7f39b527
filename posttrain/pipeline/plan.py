"""The plan: for every stage its key, whether it must run and why, what goes in, what comes out, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import registry
from posttrain.errors import Problem, RecipeError
from posttrain.pipeline.device import computes_on_host, planning_for
from posttrain.pipeline.fingerprint import digest, explain, key_document, key_of
from posttrain.pipeline.graph import Graph, in_section, section_of
from posttrain.pipeline.lock import held
from posttrain.pipeline.run_dir import RunDir, list_runs
from posttrain.pipeline.stage import ArtifactMeta, Estimate, Stage, StageConfig
from posttrain.pipeline.store import Artifact, Store, damage
from posttrain.report.cache_note import with_states

if TYPE_CHECKING:
    from posttrain.config.recipe import ResolvedRecipe

RUNTIME_BYTES = 450_000_000
"""Resident memory of a worker before it holds a weight: the interpreter, torch, transformers and their libraries, as
measured on Linux. It counts where stages compute on the host; a GPU's own account does not include it."""


@dataclass(frozen=True)
class PlannedInput:
    """One input of a planned stage: where it comes from and what is known of it (None: its producer has an error)."""

    reference: str
    stage: str
    output: str
    key: str
    meta: ArtifactMeta | None


@dataclass
class StagePlan:
    """One stage of a plan.

    Attributes:
        status: "cached", "pending", or "running" (some process works on that key now).
        selected: False when --from, --until or --only leave the stage out.
        forced: to run although it is in the store, until it has; begun: it has started to, and then goes on.
        before: the digests of the files that a forced stage had before it began, by output.
        reasons: why it must run, or what will happen.
        outputs: metas, measured for a cached stage, else predicted.
        artifact: the finished artifact of a cached stage.
        damaged: the artifact under the key is not what was written; it is moved aside before the stage runs.
        resumes: an earlier attempt left a work folder from which the stage goes on.
    """

    name: str
    stage: Stage
    cfg: StageConfig
    key: str
    document: dict[str, Any]
    inputs: dict[str, PlannedInput]
    status: str = "pending"
    selected: bool = True
    forced: bool = False
    damaged: bool = False
    reasons: list[str] = field(default_factory=list)
    outputs: dict[str, ArtifactMeta] = field(default_factory=dict)
    estimate: Estimate = field(default_factory=Estimate)
    artifact: Artifact | None = None
    resumes: bool = False
    begun: bool = False
    before: dict[str, Any] | None = None

    @property
    def to_do(self) -> bool:
        return self.status != "cached" and self.selected

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "type": self.stage.type,
            "key": self.key,
            "status": self.status,
            "selected": self.selected,
            "reasons": self.reasons,
            "inputs": {
                name: {"reference": one.reference, "stage": one.stage, "output": one.output, "key": one.key}
                for name, one in self.inputs.items()
            },
            "outputs": {name: meta.to_json() for name, meta in self.outputs.items()},
            "estimate": {**asdict(self.estimate), "notes": list(self.estimate.notes)},
        }


@dataclass
class Plan:
    """All stages in execution order, and where results go."""

    resolved: ResolvedRecipe
    outputs: Path
    run_name: str
    recipe_digest: str
    stages: list[StagePlan]

    @property
    def store(self) -> Store:
        return Store(self.outputs / "store")

    @property
    def run_dir(self) -> RunDir:
        return RunDir(self.outputs / "runs" / self.run_name)

    @property
    def to_do(self) -> list[StagePlan]:
        """Selected stages that are not in the store."""
        return [stage for stage in self.stages if stage.to_do]

    def __getitem__(self, name: str) -> StagePlan:
        return next(stage for stage in self.stages if stage.name == name)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.resolved.recipe,
            "run": self.run_name,
            "outputs": str(self.outputs),
            "seed": self.resolved.frame.seed,
            "stages": [stage.to_json() for stage in self.stages],
        }


def make_plan(
    resolved: ResolvedRecipe,
    from_: str | None = None,
    until: str | None = None,
    only: str | None = None,
    force: Iterable[str] = (),
    *,
    name: str | None = None,
    outputs: Path | None = None,
    replacing: str | None = None,
    selected: set[str] | None = None,
    begun: Mapping[str, dict[str, Any] | None] | None = None,
) -> Plan:
    """Plan a resolved recipe; writes nothing but the user's cache of digests.

    Args:
        from_, until, only: stage names that narrow the selection (`Graph.select`).
        force: stages to run although they are in the store.
        name: run name instead of the recipe's or the default one.
        outputs: folder instead of the recipe's `paths.outputs`.
        replacing: a stage whose artifact is about to be replaced, so that damage to it is no error.
        selected: the selection itself, in place of the three.
        begun: those of `force` that have begun to run again, with the files that they had before.

    Raises:
        RecipeError: all references, checks and selections that are wrong, at once; or a name that no run may have.
    """
    if name is not None:
        check_run_name(name)
    graph = Graph({stage_name: (registry.stage(cfg.type), cfg) for stage_name, cfg in resolved.stages.items()})
    selected = graph.select(from_, until, only) if selected is None else selected
    forced = set(force)
    for stage_name in forced:
        graph.require(stage_name, "--force")
        if stage_name not in selected:
            raise RecipeError(f"--force {stage_name}: that stage is left out", fix="widen --from, --until or --only")
    folder = Path(os.path.abspath(outputs or resolved.frame.paths.outputs))
    previous = _previous_stages(resolved.recipe, folder)
    store = Store(folder / "store")
    stages = _Planner(resolved, graph, store, selected, forced, begun or {}, previous, replacing).plan()
    recipe_digest = digest_of_recipe(resolved, graph)
    run_name = name or resolved.frame.run.name or f"{resolved.recipe}-{recipe_digest[:8]}"
    return Plan(resolved, folder, run_name, recipe_digest, stages)


def check_run_name(name: str) -> None:
    """Raises RecipeError unless a run may have that name, by the rule for a recipe's `run.name`."""
    from pydantic import ValidationError

    from posttrain.config.schema import Run

    try:
        Run.model_validate({"name": name})
    except ValidationError as error:
        fix = "use letters, digits, '.', '_' and '-', with a letter or a digit first"
        raise RecipeError(f"'{name}' cannot be the name of a run's folder", "--name", fix) from error


def digest_of_recipe(resolved: ResolvedRecipe, graph: Graph) -> str:
    """SHA-256 of what the recipe computes and on which engine: not its run's name, paths, launcher or tracker."""
    frame = resolved.frame.model_dump(mode="json", include={"seed", "engine"})
    stages = {name: graph.stages[name][1].digest_fields() for name in sorted(graph.stages)}
    return digest({"recipe": resolved.recipe, "frame": frame, "stages": stages})


class _Planner:
    """Walks the graph in order and collects every error on the way."""

    def __init__(
        self,
        resolved: ResolvedRecipe,
        graph: Graph,
        store: Store,
        selected: set[str],
        forced: set[str],
        begun: Mapping[str, dict[str, Any] | None],
        previous: dict[str, dict[str, Any]],
        replacing: str | None,
    ) -> None:
        self.replacing, self.begun = replacing, begun
        self.seed, self.resolved = resolved.frame.seed, resolved
        self.graph, self.store, self.selected, self.forced, self.previous = graph, store, selected, forced, previous
        self.engine, self.device = resolved.frame.engine, resolved.frame.engine.device
        self.done: dict[str, StagePlan] = {}
        self.problems: list[Problem] = []

    def plan(self) -> list[StagePlan]:
        for name in self.graph.order:
            planned = self._identify(name)
            if planned is None:
                continue
            self.done[name] = planned
            self._find(planned)
            self._predict(planned)
        if self.problems:
            raise RecipeError(problems=list(dict.fromkeys(self.problems)))
        return list(self.done.values())

    def _identify(self, name: str) -> StagePlan | None:
        """Key and inputs; None when the stage or one before it has no key because of an error already noted."""
        stage, cfg = self.graph.stages[name]
        inputs = {}
        for input_name, edge in self.graph.edges[name].items():
            parent = self.done.get(edge.stage)
            if parent is None:
                return None
            meta = parent.outputs.get(edge.output)
            inputs[input_name] = PlannedInput(edge.reference, edge.stage, edge.output, parent.key, meta)
        try:
            producers = {input_name: (one.key, one.output) for input_name, one in inputs.items()}
            document = key_document(stage, cfg, self.seed, producers)
        except RecipeError as error:
            self._note(name, error)
            return None
        return StagePlan(name, stage, cfg, key_of(document), document, inputs)

    def _find(self, planned: StagePlan) -> None:
        """Status and reasons."""
        name, type_, key = planned.name, planned.stage.type, planned.key
        planned.selected = name in self.selected
        planned.forced, planned.begun, planned.before = name in self.forced, name in self.begun, self.begun.get(name)
        work_dir = self.store.work_dir(type_, key)
        try:
            artifact = self.store.find(type_, key)
        except RecipeError as error:
            self._note(name, error)
            return
        broken = damage(artifact.folder, content=False) if artifact is not None else []
        if broken and artifact is not None and "adopted" in artifact.manifest and name != self.replacing:
            what = f"the adopted artifact of stage {name} is damaged: {', '.join(broken)}"
            fix = f"posttrain adopt it again with --force, or remove {artifact.folder} to have it computed"
            self._note(name, RecipeError(what, str(artifact.folder), fix))
            return
        if broken:
            planned.damaged, artifact = True, None
        if artifact is not None and not planned.forced:
            planned.status, planned.artifact = "cached", artifact
            if adopted := artifact.manifest.get("adopted"):
                planned.reasons = [f"adopted from {adopted['from']}"]
            return
        planned.resumes = work_dir.exists() and (planned.begun or not planned.forced)
        if held(work_dir / "lock"):
            planned.status, planned.reasons = "running", ["being computed now"]
        else:
            planned.reasons = self._why(planned, artifact)
        if broken:
            planned.reasons = [f"its artifact is damaged ({', '.join(broken)}) and is made again"]

    def _why(self, planned: StagePlan, artifact: Artifact | None) -> list[str]:
        if planned.forced and artifact is not None:
            return ["forced"]
        before = self.previous.get(planned.name)
        parents = {name: one.stage for name, one in planned.inputs.items()}
        reasons = explain(before["key_document"] if before else None, planned.document, parents)
        if before is not None and not reasons:
            reasons = ["not finished" if planned.resumes or before["status"] != "cached" else "gone from the store"]
        return [*reasons, "continues where it stopped"] if planned.resumes else reasons

    def _predict(self, planned: StagePlan) -> None:
        """Outputs and cost; checks only what has still to run, since a finished artifact has passed them."""
        metas = {name: one.meta for name, one in planned.inputs.items()}
        known = {name: meta for name, meta in metas.items() if meta is not None}
        if len(known) < len(metas):
            return
        shared = (self.engine.strategy, self.engine.world_size) if planned.stage.parallel else ("single", 1)
        try:
            with planning_for(self.device, *shared):
                if planned.artifact is not None:
                    planned.outputs = planned.artifact.metas
                else:
                    planned.outputs = planned.stage.describe(planned.cfg, known)
                    planned.stage.check(planned.cfg, known)
                    self._check_ranks(planned)
                estimate = self._with_runtime(planned.stage.estimate(planned.cfg, known))
                estimate = with_states(estimate, planned.outputs, known)
                planned.estimate = self._of_all_ranks(planned, estimate)
        except RecipeError as error:
            self._note(planned.name, error)

    def _check_ranks(self, planned: StagePlan) -> None:
        engine = self.engine
        if engine.strategy == "zero3" and planned.stage.parallel and getattr(planned.cfg, "compile", None) == "layers":
            what = "engine zero3 swaps the weights of layers while they compute, and compiles none"
            raise RecipeError(what, "compile", "compile=auto, or engine=fsdp2")
        if engine.world_size == 1 or not planned.stage.parallel:
            return
        if engine.nodes > 1 and self.resolved.frame.launcher.type == "local":
            what = f"engine.nodes={engine.nodes}, but launcher={self.resolved.frame.launcher.name} starts processes on "
            raise RecipeError(f"{what}this machine alone", "engine.nodes", "launcher=slurm, or engine.nodes=1")
        try:
            planned.stage.check_ranks(planned.cfg, engine.world_size)
        except ValueError as error:
            setting = f"engine.ranks={engine.ranks}" + (f" engine.nodes={engine.nodes}" if engine.nodes > 1 else "")
            fix = "another number of ranks, or of sequences a step"
            raise RecipeError(f"{setting}, stage {planned.name}: {error}", "engine.ranks", fix) from error

    def _with_runtime(self, estimate: Estimate) -> Estimate:
        """Add the `runtime` term where memory is estimated and is that of the host."""
        if not estimate.memory or not computes_on_host(self.device):
            return estimate
        return replace(estimate, memory={**estimate.memory, "runtime": RUNTIME_BYTES})

    def _of_all_ranks(self, planned: StagePlan, estimate: Estimate) -> Estimate:
        """Ranks on the host share its memory; on GPUs each has its own."""
        ranks = self.engine.ranks
        if ranks == 1 or not planned.stage.parallel or not computes_on_host(self.device):
            return estimate
        return replace(estimate, memory={term: ranks * size for term, size in estimate.memory.items()})

    def _note(self, name: str, error: RecipeError) -> None:
        stage, section = self.graph.stages[name][0], section_of(name)
        for problem in in_section(error.problems, stage, name):
            where = problem.where or section
            self.problems.append(Problem(problem.what, self.resolved.origins.get(where, where), problem.fix))


def _previous_stages(recipe: str, outputs: Path) -> dict[str, dict[str, Any]]:
    """Stages of the most recent run of that recipe, by name; unreadable runs are passed over."""
    for run in list_runs(outputs):
        try:
            record = run.record()
        except RecipeError:
            continue
        if record.get("recipe") == recipe:
            return {stage["name"]: stage for stage in record["stages"] if "key_document" in stage}
    return {}
