"""What a run's events say of its jobs, and how such a run ends: by whoever finds that nothing of it is left to come."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, PosttrainError, RecipeError, StageError
from posttrain.launch.slurm.commands import queued, scancel
from posttrain.pipeline.events import Event, EventLog
from posttrain.pipeline.lock import Lock, LockHeld, held
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.run_dir import RunDir

OVER = ("done", "failed", "cancelled", "stopped")
"""What a stage can have come to; one that waits for another attempt is none of these."""
_ENDS = {
    "stage_finished": "done",
    "stage_cached": "done",
    "stage_failed": "failed",
    "stage_cancelled": "cancelled",
}
SETTLE_PATIENCE = 600.0
"""Seconds that the end of a run waits for the run's lock: a long chain may just be being submitted."""


@dataclass
class Entry:
    """One stage of a submission.

    Attributes:
        status: "queued", "running", or one of `OVER`.
        job: its job's id, None for a stage that was in the store or not submitted.
        after: stages it waits for, with the policy ("afterok", "afterany").
        sharing: names of the other runs of a sweep for which the job computes the stage.
        owner: name of the run whose job computes the stage, when it is another one's.
        key: of the stage, as it was submitted.
    """

    status: str = "queued"
    job: str | None = None
    after: dict[str, str] = field(default_factory=dict)
    sharing: list[str] = field(default_factory=list)
    owner: str | None = None
    key: str = ""

    @property
    def over(self) -> bool:
        return self.status in OVER


@dataclass
class Ledger:
    """The newest submission of a run, or an earlier one.

    Attributes:
        entries: the stages that it is about, in order.
        slurm: whether the run was started by a submission at all.
        finished: the status with which it ended, None while it has not.
        cancelled: somebody asked it to stop.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    slurm: bool = False
    finished: str | None = None
    cancelled: bool = False

    @property
    def left(self) -> dict[str, Entry]:
        """Entries that have not come to an end."""
        return {name: entry for name, entry in self.entries.items() if not entry.over}

    @property
    def jobs(self) -> dict[str, str]:
        """Stage to job of what is left and was submitted for this run."""
        return {name: entry.job for name, entry in self.left.items() if entry.job is not None and entry.owner is None}


def read_ledger(run: RunDir, events: Iterable[Event] | None = None) -> Ledger:
    """The ledger of a run's newest submission; of the newest in `events`, where those are given."""
    ledger = Ledger()
    for event in run.events() if events is None else events:
        kind, stage = event["event"], event.get("stage")
        if kind == "run_started":
            ledger = Ledger({name: Entry() for name in event.get("expected", [])}, event.get("launcher") == "slurm")
        elif kind == "run_finished":
            ledger.finished = str(event.get("status"))
        elif kind == "stop_requested":
            ledger.cancelled = True
        elif stage in ledger.entries:
            _take_in(ledger.entries[stage], kind, event)
    return ledger


def _take_in(entry: Entry, kind: str, event: Event) -> None:
    if kind == "stage_submitted":
        entry.job, entry.after = str(event["job"]), dict(event.get("after", {}))
        entry.sharing, entry.owner = list(event.get("sharing", [])), event.get("owner")
        entry.key = str(event.get("key", ""))
        if event.get("running"):  # a job that was kept
            entry.status = "running"
    elif kind == "stage_started":
        entry.status = "running"
    elif kind in _ENDS:
        entry.status = _ENDS[kind]
    elif kind == "stage_stopped":
        entry.status = "queued" if event.get("requeue") else "stopped"


def active_jobs(run: RunDir) -> dict[str, str]:
    """Stage to job id of what is queued or running of a run now, by its events and Slurm's own word."""
    jobs = read_ledger(run).jobs
    if not jobs:
        return {}
    there = queued(patience=10.0)
    return {stage: job for stage, job in jobs.items() if job in there}


def refuse_beside_jobs(run: RunDir) -> None:
    """Raises RecipeError when a run that is to be executed here has jobs in a queue that execute it already."""
    ledger = read_ledger(run) if run.exists() else Ledger()
    if not ledger.slurm or ledger.finished is not None:
        return
    try:
        jobs = active_jobs(run)
    except StageError:
        return  # no Slurm to ask here; that no stage is computed twice at a time is seen to by the locks
    if jobs:
        listed = ", ".join(f"{stage} {job}" for stage, job in jobs.items())
        fix = f"wait for them ({run.typed('status')}), or end them first: {run.typed('cancel')}"
        raise RecipeError(f"run {run.name} has jobs of Slurm's in the queue: {listed}", str(run.path), fix)


def cancel_descendants(run: RunDir, stage: str, message: str) -> list[str]:
    """Cancel the jobs of all stages that can no longer have what they need; returns those stages."""
    entries = read_ledger(run).entries
    lost, found = {stage}, True
    while found:
        found = {
            name
            for name, entry in entries.items()
            if name not in lost and not entry.over and any(entry.after.get(one) == "afterok" for one in lost)
        }
        lost |= found
    lost.discard(stage)
    names = [name for name in entries if name in lost]
    log = EventLog(run.events_path)
    for name in names:
        log.append("stage_cancelled", name, job=entries[name].job, message=message)
    own = [entries[name].job or "" for name in names if entries[name].owner is None]
    try:
        scancel([job for job in own if job])
    except StageError as error:
        # Slurm ends them by itself, as what they depend on has failed.
        print(f"posttrain: {error}", flush=True)
    return names


def tell_sharing(run: RunDir, stage: str, event: str, job: str, **fields: Any) -> None:
    """Tell the other runs of a sweep, for which the stage's job computes it too, what has become of it."""
    from posttrain.pipeline.frozen import frozen_plan

    entry = read_ledger(run).entries.get(stage)
    for name in entry.sharing if entry is not None else ():
        other = RunDir(run.path.with_name(name))
        EventLog(other.events_path).append(event, stage, job=job, **fields)
        if event == "stage_cancelled":
            cancel_descendants(other, stage, str(fields["message"]))
        elif (artifact := other.artifact(stage)) is not None:
            other.link_artifact(stage, artifact.folder)
        settle(other, lambda other=other: frozen_plan(other), own_job=job)


def settle(
    run: RunDir, plan: Callable[[], Plan], *, own_job: str | None = None, patience: float = SETTLE_PATIENCE
) -> Ledger:
    """End a run of which nothing is left to come: its report and its last event, once, whoever asks; its ledger.

    A stage whose job is gone without a word of how it ended is given up here.

    Args:
        own_job: the job that this process is, which need not be asked for.
        patience: seconds to wait for the run's lock; somebody who has it longer does what is to be done.
    """
    if (ledger := read_ledger(run)).finished or not ledger.slurm:
        return ledger
    try:
        lock = Lock.acquire(run.lock_path, patience=patience)
    except LockHeld:
        return ledger
    with lock:
        ledger = read_ledger(run)
        if ledger.finished:
            return ledger
        _give_up_lost(run, ledger, own_job)
        ledger = read_ledger(run)
        if ledger.left:
            return ledger
        message = ""
        states = {entry.status for entry in ledger.entries.values()}
        if states <= {"done"}:
            status, code = "done", EXIT_DONE
            message = _report(run, plan)
        elif states & {"failed"} or not ledger.cancelled:
            status, code = "failed", EXIT_FAILED
        else:
            status, code = "stopped", EXIT_STOPPED
        EventLog(run.events_path).append("run_finished", status=status, exit=code, message=message)
        return read_ledger(run)


def _give_up_lost(run: RunDir, ledger: Ledger, own_job: str | None) -> None:
    """Log an end for stages whose job Slurm does not have any more: killed without notice, or cancelled by hand."""
    if not ledger.left:
        return
    try:
        there = queued(patience=10.0)
    except StageError:
        return  # a controller that is down knows of them still
    log = EventLog(run.events_path)
    # Looked at again: a job may have written its last event and ended since.
    for stage, entry in read_ledger(run).left.items():
        elsewhere = ledger.cancelled and entry.owner is not None
        if not elsewhere and (entry.job in there or (own_job is not None and entry.job == own_job)):
            continue
        facts: dict[str, Any] = {"job": entry.job}
        if entry.status == "running" and run.artifact(stage) is not None:
            # The store has the last word: its event may have been lost.
            log.append("stage_cached", stage, **facts)
        elif ledger.cancelled:
            log.append("stage_stopped", stage, message="ended by posttrain cancel", **facts)
        elif entry.job is None:
            log.append("stage_cancelled", stage, message="it was never submitted", **facts)
        elif entry.status == "running":
            why = f"job {entry.job} ended without saying why: cancelled, out of time or memory, or its node failed"
            advice = f"  do: see `sacct -j {entry.job}` and {run.path}/slurm, then {run.typed('resume')}"
            log.append("stage_failed", stage, message=f"stage {stage}: {why}\n{advice}", **facts)
        else:
            printed = f"{stage}-{entry.job}.out in the folder slurm of the run ({run.path}) or its sweep"
            why = f"job {entry.job} was cancelled before it ran, or posttrain could not be started in it: see {printed}"
            log.append("stage_cancelled", stage, message=why, **facts)


def _report(run: RunDir, plan: Callable[[], Plan]) -> str:
    """Build the report of a run that is done; why it could not be built."""
    from posttrain.pipeline.run_report import update_report

    try:
        made = plan()
        found = {one.name: made.store.find(one.stage.type, one.key) for one in made.stages}
        update_report(made, run, {name: artifact for name, artifact in found.items() if artifact is not None})
    except Exception as error:
        traceback.print_exc()
        return f"the report could not be built ({error}); posttrain report {run.name} tries again"
    return ""


def await_submission(run: RunDir, seconds: float = 300.0) -> None:
    """Wait until the process that submits a run has written down all that it submits."""
    deadline = time.monotonic() + seconds
    while held(run.lock_path) and time.monotonic() < deadline:
        time.sleep(0.1)


def failure_text(error: BaseException) -> str:
    """What to say of an error that ends a stage."""
    return str(error) if isinstance(error, PosttrainError) else "".join(traceback.format_exception(error))


def dependencies_of(after: Mapping[str, tuple[str, str]]) -> str:
    """The value of sbatch's `--dependency` from stage to (policy, job)."""
    return ",".join(dict.fromkeys(f"{policy}:{job}" for policy, job in after.values()))
