"""Submit a sweep: a job array for each stage of its points, one job where they share the stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.launch.slurm.ledger import settle
from posttrain.launch.slurm.script import Place
from posttrain.launch.slurm.submit import After, Submission, await_ends, needs, place_of, send, to_submit, undo
from posttrain.pipeline.files import write_text
from posttrain.pipeline.fingerprint import digest
from posttrain.pipeline.lock import Lock, LockHeld
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.stage_runner import Display


@dataclass
class _Group:
    """The points (by number) for which one submission computes a stage: several are the tasks of an array.

    Attributes:
        owners: the points in whose runs the stage is computed, in the order of the tasks.
        shared: owner to the other points that take its result.
        jobs: owner to its job, once that is submitted.
    """

    stage: str
    owners: list[int]
    shared: dict[int, list[int]] = field(default_factory=dict)
    jobs: dict[int, str] = field(default_factory=dict)


def submit_sweep(plans: Sequence[Plan], folder: Path, display: Display) -> list[dict[str, str]]:
    """Submit all points of a sweep that have something to do; stage to job of each point.

    Raises:
        RecipeError: another process executes one of the runs, or a job is at work on what is to be made otherwise now.
        StageError: Slurm refused a job; those submitted before it are cancelled.
    """
    with ExitStack() as locks:
        for plan in sorted(plans, key=lambda one: one.run_name):
            try:
                locks.enter_context(Lock.acquire(plan.run_dir.lock_path, patience=5.0))
            except LockHeld as error:
                what = f"run {plan.run_name} is executed by {error.owner or 'another process'}"
                raise RecipeError(what, str(plan.run_dir.path), "wait for it, or end it first") from error
        jobs = _Sweep(plans, folder, display).submit()
    for plan in plans:
        # A point whose stages are all in the store has no job that would end its run.
        settle(plan.run_dir, lambda plan=plan: plan, patience=5.0)
    return jobs


class _Sweep:
    def __init__(self, plans: Sequence[Plan], folder: Path, display: Display) -> None:
        self.plans, self.folder, self.display = plans, folder, display
        self.stages = [to_submit(plan) for plan in plans]
        self.submissions = [Submission(plan, plan.run_dir, display) for plan in plans]
        self.jobs: list[dict[str, str]] = [{} for _ in plans]
        """Of each point: stage to job, of every stage that is to come."""
        self.new: set[str] = set()

    def submit(self) -> list[dict[str, str]]:
        there = await_ends([plan.run_dir for plan in self.plans], self.display)
        for one, stages in zip(self.submissions, self.stages, strict=True):
            one.check(stages, there)
        self.kept = [
            one.begin(stages, there, sweep=self.folder.name)
            for one, stages in zip(self.submissions, self.stages, strict=True)
        ]
        try:
            for name in dict.fromkeys(planned.name for stages in self.stages for planned in stages):
                for group in self._groups(name):
                    self._group(group)
        except BaseException as error:
            undo(self.submissions, self.new, error)
            raise
        return self.jobs

    def _groups(self, name: str) -> Iterable[_Group]:
        """Who computes a stage: the first of the points that have it under the same key, or the one that has begun."""
        points = [number for number, stages in enumerate(self.stages) if any(one.name == name for one in stages)]
        same: dict[str, list[int]] = {}
        for number in sorted(points, key=lambda number: name not in self.kept[number]):
            same.setdefault(self.plans[number][name].key, []).append(number)
        owners = [numbers[0] for numbers in same.values()]
        shared = {numbers[0]: numbers[1:] for numbers in same.values()}
        for number in owners:
            if name in self.kept[number]:
                yield _Group(name, [number], shared, {number: self.kept[number][name]})
        # Tasks of an array ask for the same resources.
        alike: dict[str, list[int]] = {}
        for number in owners:
            if name not in self.kept[number]:
                frame = self.plans[number].resolved.frame
                alike.setdefault(f"{frame.launcher!r} {frame.engine!r}", []).append(number)
        for numbers in alike.values():
            for together in self._with_equal_parents(name, numbers):
                yield _Group(name, together, shared)

    def _with_equal_parents(self, name: str, numbers: list[int]) -> Iterable[list[int]]:
        """Points that one array can do for: its dependency is the same for all tasks, or goes task by task.

        An array that waited for all of another one would be lost with the first of that one's tasks that fails.
        """
        by_array: dict[object, list[int]] = {}
        for number in numbers:
            jobs = [(one, job.partition("_")[0]) for one, (_, job) in self._after(number, name).items()]
            by_array.setdefault(tuple(jobs), []).append(number)
        for together in by_array.values():
            if self._after_of_all(_Group(name, together)) is not None:
                yield together
                continue
            by_job: dict[object, list[int]] = {}
            for number in together:
                by_job.setdefault(tuple(self._after(number, name).items()), []).append(number)
            yield from by_job.values()

    def _group(self, group: _Group) -> None:
        name, first = group.stage, self.plans[group.owners[0]]
        array = len(group.owners) > 1
        place = self._place(group) if array else place_of(first.run_dir)
        if not group.jobs:
            after = self._after_of_all(group) if array else self._after(group.owners[0], name)
            assert after is not None, "points of an array have equal parents"
            job = send(first, first[name], place, after)
            self.new.add(job)
            group.jobs = {number: f"{job}_{task}" if array else job for task, number in enumerate(group.owners)}
        for number in group.owners:
            others = group.shared[number]
            names = [self.plans[other].run_name for other in others]
            self._record(number, name, group.jobs[number], place, sharing=names, kept=name in self.kept[number])
            for other in others:
                self._record(other, name, group.jobs[number], place, owner=self.plans[number].run_name)

    def _record(self, number: int, name: str, job: str, place: Place, **facts: object) -> None:
        self.jobs[number][name] = job
        planned = self.plans[number][name]
        self.submissions[number].record(planned, job, self._after(number, name), place.script(name), **facts)

    def _place(self, group: _Group) -> Place:
        """Where an array's script is, with the list of the runs that its tasks are for."""
        folder = self.folder / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        content = "".join(f"{self.plans[number].run_dir.path}\n" for number in group.owners)
        # By content: a task of an earlier submission may read its own list again when it is requeued.
        runs = folder / f"{group.stage}-{digest(content)[:12]}.runs"
        write_text(runs, content)
        return Place(folder, self.folder.name, runs=runs, tasks=len(group.owners))

    def _after(self, number: int, name: str) -> After:
        """What the stage of one point waits for."""
        plan, jobs = self.plans[number], self.jobs[number]
        return {one: (policy, jobs[one]) for one, policy in needs(plan, plan[name]).items() if one in jobs}

    def _after_of_all(self, group: _Group) -> After | None:
        """What an array waits for: the one job before all tasks, or, task by task, those of another array.

        None where neither is so.
        """
        found: dict[str, tuple[str, str]] = {}
        each = [self._after(number, group.stage) for number in group.owners]
        for parent in dict.fromkeys(one for after in each for one in after):
            if not all(parent in after for after in each):
                return None
            policy, jobs = each[0][parent][0], [after[parent][1] for after in each]
            array = jobs[0].partition("_")[0]
            if len(set(jobs)) == 1:
                found[parent] = (policy, jobs[0])
            elif (
                policy == "afterok"
                and jobs == [f"{array}_{task}" for task in range(len(jobs))]
                and self._tasks(parent, jobs) == len(jobs)
            ):
                found[parent] = ("aftercorr", array)
            else:
                return None
        return found

    def _tasks(self, parent: str, jobs: Sequence[str]) -> int:
        """How many tasks the array has that these are of."""
        array = jobs[0].partition("_")[0]
        return len({one[parent] for one in self.jobs if parent in one and one[parent].startswith(f"{array}_")})


def count_of(jobs: Sequence[Mapping[str, str]]) -> int:
    """How many jobs a sweep has in the queue; the tasks of an array count each."""
    return len({job for one in jobs for job in one.values()})
