"""Submit a run: a job for every stage that is neither done nor in the queue, each after those it needs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import EXIT_FAILED, Problem, RecipeError, StageError
from posttrain.launch.slurm.commands import queued, sbatch, scancel
from posttrain.launch.slurm.ledger import Ledger, dependencies_of, read_ledger
from posttrain.launch.slurm.script import Place, script_text
from posttrain.pipeline.execution import Execution, RunResult, freeze
from posttrain.pipeline.files import write_text
from posttrain.pipeline.lock import Lock, LockHeld
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.runner import check_name, check_selection
from posttrain.pipeline.stage_runner import Display, StageRunner

ENDING_SECONDS = 180.0
"""For jobs that were told to end: longer than clusters wait between SIGTERM and SIGKILL."""
After = Mapping[str, tuple[str, str]]
"""What a job waits for: stage to (policy, job)."""


@dataclass(frozen=True)
class Submitted:
    """What a submission has come to.

    Attributes:
        jobs: stage to job, of all that the run now waits for; kept: those that were in the queue before.
        result: the run's end, when nothing was to do.
    """

    run: RunDir
    jobs: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    result: RunResult | None = None


def to_submit(plan: Plan) -> list[StagePlan]:
    """The stages that need a job: what is to do, and what may have to be made again because something before it is."""
    again = {one.name for one in plan.stages if one.to_do and (one.forced or one.damaged)}
    found = []
    for planned in plan.stages:
        if planned.selected and any(one.stage in again for one in planned.inputs.values()):
            again.add(planned.name)
        if planned.to_do or planned.name in again:
            found.append(planned)
    return found


def needs(plan: Plan, planned: StagePlan) -> dict[str, str]:
    """Stages that a stage waits for, each with the policy of the edge."""
    policies = plan.resolved.frame.launcher.dependencies.get(planned.name, {})
    parents = dict.fromkeys(one.stage for one in planned.inputs.values())
    return {parent: policies.get(parent, "afterok") for parent in parents}


def arguments(after: After, script: Path) -> list[str]:
    """What sbatch is called with. `after`: stage to (policy, job)."""
    found = ["--parsable", "--export=ALL"]
    if after:
        # Without the second, a job whose condition can no longer come true would wait for ever.
        found += [f"--dependency={dependencies_of(after)}", "--kill-on-invalid-dep=yes"]
    return [*found, str(script)]


def place_of(run: RunDir) -> Place:
    return Place(run.path / "slurm", run.name, run=run.path)


def dry_run(plan: Plan) -> str:
    """The files and commands of a submission, as a shell script of their own."""
    stages, place = to_submit(plan), place_of(plan.run_dir)
    parts = [f"# {place.name}: {len(stages)} jobs, {len(plan.stages) - len(stages)} stages in the store or left out"]
    for planned in stages:
        parts.append(f"# ==> {place.script(planned.name)} <==\n{script_text(plan, planned, place, Path.cwd())}")
    names = {planned.name: planned.name.replace(".", "_") for planned in stages}
    lines = ["# ==> the commands <=="]
    for planned in stages:
        after = {one: (policy, f"${names[one]}") for one, policy in needs(plan, planned).items() if one in names}
        words = [word if "$" in word else shlex.quote(word) for word in arguments(after, place.script(planned.name))]
        lines.append(f"{names[planned.name]}=$(sbatch {' '.join(words)})")
    return "\n".join([*parts, *lines])


def submit(plan: Plan, display: Display) -> Submitted:
    """Submit what a plan has to do; a job that is queued or running already is kept.

    Raises:
        RecipeError: nothing was submitted: the run cannot be, or another process executes it.
        StageError: Slurm refused a job; those submitted before it are cancelled.
    """
    check_selection(plan)
    check_name(plan)
    run = plan.run_dir
    try:
        lock = Lock.acquire(run.lock_path, patience=5.0)
    except LockHeld as error:
        what = f"run {run.name} is executed by {error.owner or 'another process'}"
        raise RecipeError(what, str(run.path), f"wait for it, or end it first: {run.typed('cancel')}") from error
    with lock:
        stages = to_submit(plan)
        if not stages:
            return Submitted(run, result=Execution(plan, run, display).run_all())
        return Submission(plan, run, display).submit(stages, await_ends([run], display))


def await_ends(runs: Sequence[RunDir], display: Display) -> dict[str, str]:
    """Jobs in the queue with their states, once none of these runs' is on its way out and would be taken to go on.

    Raises:
        RecipeError: they do not end.
    """
    deadline, told = time.monotonic() + ENDING_SECONDS, False
    while True:
        there = queued()
        ending = {job: run.name for run in runs for job in _ending(run, there)}
        if not ending:
            return there
        listed = ", ".join(ending)
        if time.monotonic() > deadline:
            what = f"jobs of run {next(iter(ending.values()))} were told to end and have not: {listed}"
            raise RecipeError(what, fix=f"wait for them, or end them: scancel {' '.join(ending)}")
        if not told:
            display.note(f"waiting for jobs that are just ending: {listed}")
            told = True
        time.sleep(1.0)


def _ending(run: RunDir, there: Mapping[str, str]) -> list[str]:
    ledger = read_ledger(run)
    jobs = [job for job in ledger.jobs.values() if job in there]
    return jobs if ledger.cancelled else [job for job in jobs if there[job] == "COMPLETING"]


class Submission(StageRunner):
    """One submission of a run; the caller holds the run's lock, for which the jobs wait before they begin."""

    def begin(self, stages: list[StagePlan], there: Mapping[str, str], **facts: Any) -> dict[str, str]:
        """Write down what is to come; stage to job of those that are in the queue already.

        Raises:
            RecipeError: a job is at work on a stage that is to be made otherwise now. Nothing has been written.
        """
        before = self._before()
        kept, stale = self._in_queue(stages, before, there)
        # First of all: should Slurm refuse, the run stays as it was.
        scancel(stale)
        freeze(self.plan, self.run_dir)
        facts |= {"recipe": self.plan.resolved.recipe, "stages": len(self.plan.stages)}
        self.log.append("run_started", launcher="slurm", expected=[planned.name for planned in stages], **facts)
        # What has ended until now, in the eyes of the events; what ends from here on is the new ledger's.
        events = self.run_dir.events()
        last = max(index for index, event in enumerate(events) if event["event"] == "run_started")
        left = read_ledger(self.run_dir, events[:last]).jobs
        kept = {name: job for name, job in kept.items() if name in left}
        for planned in self.plan.stages:
            if planned.artifact is not None and planned not in stages:
                self._cached(planned, planned.artifact)
        # Before anything is submitted: they may begin or end at any time.
        place = place_of(self.run_dir)
        for planned in (one for one in stages if one.name in kept):
            after = {one: (how, kept[one]) for one, how in needs(self.plan, planned).items() if one in kept}
            entry = before.entries[planned.name]
            facts = {"kept": True, "running": entry.status == "running", "sharing": entry.sharing}
            self.record(planned, kept[planned.name], after, place.script(planned.name), **facts)
        return kept

    def check(self, stages: list[StagePlan], there: Mapping[str, str]) -> None:
        """Raise RecipeError where `begin` would: for who begins several runs, and must not stop half way."""
        self._in_queue(stages, self._before(), there)

    def _before(self) -> Ledger:
        return read_ledger(self.run_dir) if self.run_dir.exists() else Ledger()

    def _in_queue(
        self, stages: list[StagePlan], before: Ledger, there: Mapping[str, str]
    ) -> tuple[dict[str, str], list[str]]:
        """Stage to job of those that go on, and jobs that wait for what will not come, or with other settings."""
        kept: dict[str, str] = {}
        stale, problems, names = [], [], {one.name for one in stages}
        for planned in stages:
            job = before.jobs.get(planned.name)
            if job is None or job not in there:
                continue
            parents = {one for one in needs(self.plan, planned) if one in names}
            same = before.entries[planned.name].key == planned.key and not planned.forced
            if same and parents <= kept.keys():
                kept[planned.name] = job
            elif there[job] == "PENDING":
                stale.append(job)
            else:
                what = f"job {job} is at work on stage {planned.name}, which is to be made otherwise now"
                fix = f"wait for it, or end it first: {self.plan.run_dir.typed('cancel')}"
                problems.append(Problem(what, fix=fix))
        if problems:
            raise RecipeError(problems=problems)
        return kept, stale

    def record(self, planned: StagePlan, job: str, after: After, script: Path, **facts: Any) -> None:
        """Write down that a stage's job is in the queue."""
        policies = {name: policy for name, (policy, _) in after.items()}
        facts |= {"job": job, "after": policies, "dependency": dependencies_of(after), "script": str(script)}
        facts["key"] = planned.key
        self.log.append("stage_submitted", planned.name, **facts)

    def submit(self, stages: list[StagePlan], there: Mapping[str, str]) -> Submitted:
        """Submit every stage that is not in the queue yet."""
        kept, place = self.begin(stages, there), place_of(self.run_dir)
        jobs = dict(kept)
        try:
            for planned in (one for one in stages if one.name not in kept):
                name = planned.name
                after = {one: (policy, jobs[one]) for one, policy in needs(self.plan, planned).items() if one in jobs}
                jobs[name] = send(self.plan, planned, place, after)
                self.record(planned, jobs[name], after, place.script(name), kept=False)
        except BaseException as error:
            undo([self], {job for name, job in jobs.items() if name not in kept}, error)
            raise
        return Submitted(self.run_dir, jobs, list(kept))


def send(plan: Plan, planned: StagePlan, place: Place, after: After) -> str:
    """Write a stage's script and submit it; the job's id."""
    script = place.script(planned.name)
    script.parent.mkdir(parents=True, exist_ok=True)
    write_text(script, script_text(plan, planned, place, Path.cwd()))
    try:
        return sbatch(arguments(after, script))
    except StageError as error:
        problem = error.problems[0]
        what = f"Slurm did not take the job of stage {planned.name}: {problem.what}"
        fix = problem.fix or f"correct launcher or launcher.stages.{planned.name}, then the same command"
        raise StageError(what, problem.where, fix) from error


def undo(submissions: Iterable[Submission], jobs: Collection[str], error: BaseException) -> None:
    """Cancel the jobs that were submitted before an error, end the runs, and have the error say so."""
    why = "the submission failed"
    listed, problems = ", ".join(sorted(jobs)), []
    try:
        scancel(jobs)
    except StageError as second:
        problems = [Problem(f"jobs {listed} could not be cancelled: {second}", fix="scancel them")]
    for one in submissions:
        for name, entry in read_ledger(one.run_dir).left.items():
            if entry.job is None or entry.job.partition("_")[0] in jobs:
                one.log.append("stage_cancelled", name, job=entry.job, message=why)
        # Jobs that were in the queue before go on; the last of them ends the run.
        if not read_ledger(one.run_dir).left:
            one.log.append("run_finished", status="failed", exit=EXIT_FAILED, message=f"{why}: {error}")
    if isinstance(error, StageError):
        first = error.problems[0]
        done = f"; the jobs submitted before it are cancelled ({listed})" if jobs and not problems else ""
        error.problems[:] = [Problem(f"{first.what}{done}", first.where, first.fix), *problems]
        error.args = ("\n".join(map(str, error.problems)),)


def told(submitted: Submitted) -> list[str]:
    """What to tell who submitted a run."""
    run = submitted.run
    if submitted.result is not None:
        return [f"run: {run.path}", "nothing to submit: every stage is in the store"]
    width = max(len(name) for name in submitted.jobs)
    lines = [
        f"  {name:{width}}  {job}{'  (in the queue already)' if name in submitted.kept else ''}"
        for name, job in submitted.jobs.items()
    ]
    return [f"run {run.name}: {len(submitted.jobs)} jobs", *lines, f"follow it with: {run.typed('status')}"]
