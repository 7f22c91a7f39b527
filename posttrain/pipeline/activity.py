"""Who works on a run now: its runner, workers of its stages, jobs that wait in a queue. From its folder alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from posttrain.pipeline import slurm_job
from posttrain.pipeline.events import Event
from posttrain.pipeline.lock import held
from posttrain.pipeline.progress import RunState, state_of
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.store import Store


@dataclass(frozen=True)
class Activity:
    """What is going on in a run.

    Attributes:
        state: what its events tell.
        executed: a process of the local launcher executes it (or a job finishes it).
        working: stages whose work folder somebody holds, for this run or another one that shares them.
        queued: stages whose job has been submitted and has neither started nor ended, and why it does not start, as
            Slurm says if it can be asked from here.
        lost: stages whose job, as Slurm says, ended without starting the stage.
    """

    state: RunState
    executed: bool = False
    working: frozenset[str] = frozenset()
    queued: dict[str, str] = field(default_factory=dict)
    lost: frozenset[str] = frozenset()

    @property
    def alive(self) -> bool:
        """Whether the run will go on by itself."""
        return self.executed or bool(self.queued) or any(self.runs(stage) for stage in self.state.stages)

    def runs(self, stage: str) -> bool:
        """Whether a process computes that stage for this run now, and not a worker that ends after its runner."""
        found = self.state.stages[stage]
        return found.status == "running" and (self.executed or bool(found.job and stage in self.working))


def activity_of(run: RunDir, events: list[Event] | None = None) -> Activity:
    """What is going on in a run now. `events`: its events, if they have been read already."""
    record = run.record()
    state = state_of(run.events() if events is None else events, [stage["name"] for stage in record["stages"]])
    executed = held(run.lock_path)
    store = Store(run.outputs / "store")
    folders = {stage["name"]: store.work_dir(stage["type"], stage["key"]) for stage in record["stages"]}
    working = frozenset(name for name, folder in folders.items() if _worked_in(folder))
    waiting = {stage.name: stage.job for stage in state.stages.values() if stage.status == "queued"}
    lost = frozenset(name for name, job in waiting.items() if _has_ended(job))
    queued = {name: slurm_job.waits_for(job) for name, job in waiting.items() if name not in lost}
    return Activity(state, executed, working, queued, lost)


def _has_ended(job: str) -> bool:
    state = slurm_job.state_of(job)
    return state is not None and state != "PENDING" and state not in slurm_job.AT_WORK


def _worked_in(folder: Path) -> bool:
    from posttrain.launch.job import CLAIM, LOCK

    return folder.is_dir() and (held(folder / LOCK) or held(folder / CLAIM))
