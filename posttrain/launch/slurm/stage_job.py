"""One stage inside its job (`posttrain stage-job RUN STAGE`): what a batch script runs, again when it is requeued."""

from __future__ import annotations

import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, StageError
from posttrain.launch.job import CLAIM, OUTCOME, Job
from posttrain.launch.signals import Interrupts
from posttrain.launch.slurm.commands import scancel, steps_of
from posttrain.launch.slurm.ledger import (
    await_submission,
    cancel_descendants,
    failure_text,
    read_ledger,
    settle,
    tell_sharing,
)
from posttrain.pipeline.events import Event, EventLog
from posttrain.pipeline.frozen import frozen_plan
from posttrain.pipeline.lock import Lock, LockHeld
from posttrain.pipeline.plan import Plan, StagePlan
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.stage_runner import StageRunner
from posttrain.pipeline.store import damage

STEP_SECONDS = 30.0
"""For the steps of a job to be gone once they are killed."""
SIGNAL_SECONDS = 1.0
"""Slurm's SIGTERM reaches all processes of a job, one after the other: the worker may end before we have heard."""


class Lines:
    """Shows milestones as lines of the job's output; progress is in the events."""

    def event(self, event: Event, state: Any) -> None:
        if event["event"] not in ("progress", "metrics"):
            fields = {name: value for name, value in event.items() if name not in ("time", "event", "stage", "message")}
            print(f"posttrain: {event['event']} {event.get('stage') or ''} {fields}", flush=True)

    def note(self, text: str) -> None:
        print(f"posttrain: {text}", flush=True)


def this_job() -> str:
    """The id of the job this process is in, as Slurm's commands take it; that of a task of an array has two parts."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "?")


def this_node() -> str:
    return os.environ.get("SLURMD_NODENAME") or platform.node()


class StageJob(StageRunner):
    """Runs the one stage that a job is for. Other jobs of the run may do the same with theirs."""

    stopping_note = "asked to stop: the stage saves its state first"

    def __init__(self, plan: Plan, run: RunDir, stage: str, interrupts: Interrupts, restarts: int) -> None:
        super().__init__(plan, run, Lines())
        self.interrupts, self.stage, self.restarts = interrupts, stage, restarts
        self.cancelled = False

    def run(self) -> tuple[str, str]:
        """Run the stage; how it ended and why, as `StageRunner` says it."""
        planned = self.plan[self.stage]
        for name in dict.fromkeys(one.stage for one in planned.inputs.values()):
            self._parent(planned, self.plan[name])
        status, message = self._stage(planned)
        if status == "damaged":
            status, message = self._damaged(planned, message)
        return status, message

    def _parent(self, planned: StagePlan, parent: StagePlan) -> None:
        if parent.artifact is None:
            what = f"stage {planned.name} needs the artifact of stage {parent.name}, which is not in the store"
            if parent.damaged:
                what = f"stage {planned.name} needs the artifact of stage {parent.name}, which is damaged"
            raise StageError(what, parent.key, f"{self.run_dir.typed('resume')} makes it again")
        self.finished[parent.name] = parent.artifact

    def _damaged(self, planned: StagePlan, message: str) -> tuple[str, str]:
        """Set aside the inputs that the worker found damaged, so that they are made again when the run is resumed."""
        outcome = self._outcome(planned) or {"damaged": {}}
        for name in dict.fromkeys(planned.inputs[one].stage for one in outcome["damaged"]):
            parent = self.plan[name]
            if parent.artifact is None or "adopted" in parent.artifact.manifest:
                continue
            try:
                with Lock.acquire(self.plan.store.work_dir(parent.stage.type, parent.key) / CLAIM):
                    lines = damage(parent.artifact.folder)
                    if lines and self.plan.store.set_damaged(parent.stage.type, parent.key):
                        self.log.append("artifact_damaged", name, lines=lines)
            except LockHeld:
                continue  # somebody is at it
        return self._failed(planned, message)

    def _started(self) -> dict[str, Any]:
        return {"job": this_job(), "node": this_node(), "restarts": self.restarts}

    def _stopped_how(self) -> dict[str, Any]:
        return {"job": this_job(), "requeue": not self.cancelled}

    def _stop_wanted(self) -> bool:
        # Not `stop_requested`, which is for the whole run: another stage's job may have all the time it needs.
        if self.interrupts.count and not self.stopping:
            self.stopping = True
            self.log.append("stage_stopping", self.stage, job=this_job(), source="signal")
            self.display.note(self.stopping_note)
        return self.stopping

    def _show_events(self) -> None:
        super()._show_events()
        self.cancelled = self.cancelled or self.state.stop_requested

    def _claim(self, planned: StagePlan, work_dir: Path) -> Lock | None:
        claim = super()._claim(planned, work_dir)
        if claim is None:
            self.log.append("stage_stopped", planned.name, waiting=True, **self._stopped_how())
        return claim

    def _conclude(self, planned: StagePlan, job: Job, code: int) -> tuple[str, str]:
        if code not in (EXIT_DONE, EXIT_STOPPED) and not self._stop_wanted():
            time.sleep(SIGNAL_SECONDS)
        outcome = self._outcome(planned)
        if outcome is None and job.nodes > 1:
            # The worker was killed; its ranks on all machines must not write beside those of the next attempt.
            end_steps(this_job(), self.display.note)
        said = "" if outcome is None else str(outcome.get("message"))
        ended = f"signal {int(signal.SIGTERM)}" in said or f"exited {128 + signal.SIGTERM}" in said
        if self._stop_wanted() and ended:
            # Ranks that Slurm's own SIGTERM ended: a stop, though not one that could save.
            (self.plan.store.work_dir(planned.stage.type, planned.key) / OUTCOME).unlink(missing_ok=True)
        return super()._conclude(planned, job, code)


def end_steps(job: str, say: Callable[[str], None]) -> None:
    """Kill the steps that a job has started with srun, and wait until they are gone. The batch script goes on.

    Of a job as a whole SIGKILL would be its end: steps are named one by one.

    Args:
        job: as `this_job` has it. By the mere number of an array, which is also that of its last task, Slurm would list
            the steps of all its tasks.
    """
    deadline = time.monotonic() + STEP_SECONDS
    try:
        while steps := steps_of(job):
            if time.monotonic() > deadline:
                say(f"steps {', '.join(steps)} do not end")
                return
            scancel(steps, "--signal=KILL")
            time.sleep(0.5)
    except StageError as error:
        say(f"steps of job {job} could not be ended: {error}")


def main(folder: Path, stage: str, interrupts: Interrupts, *, force: bool = False, died: int | None = None) -> int:
    """Run a stage of a run; the exit code says what the batch script is to do.

    0: done. 75: stopped by a signal, to be requeued. 130: stopped because the run was cancelled. 1: failed.

    Args:
        force: the stage runs although it is in the store, until an attempt of this job has begun to.
        died: nothing is run: an earlier process of this kind has ended with this code and could not say why.
    """
    run = RunDir(folder.absolute())
    log = EventLog(run.events_path)
    await_submission(run)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    ledger = read_ledger(run)
    entry = ledger.entries.get(stage)
    if entry is not None and entry.job == this_job() and entry.status == "done":
        # Its node failed after the stage was done and before Slurm knew: what comes after it still waits for this job.
        _in_spite_of_errors(settle, run, lambda: frozen_plan(run), own_job=this_job())
        return EXIT_DONE
    if entry is None or entry.job != this_job() or entry.over:
        # Such as a job that failed, whose stage was submitted anew, and that somebody has requeued.
        print(f"posttrain: run {run.name} waits for nothing from job {this_job()} ({stage})", flush=True)
        return EXIT_INTERRUPTED
    try:
        if died is not None:
            raise StageError(f"posttrain itself ended with code {died} in job {this_job()}: {_cause(died)}")
        if restarts:
            log.append("stage_requeued", stage, job=this_job(), restarts=restarts, node=this_node())
        plan = _plan(run, stage)
        plan[stage].forced = force and not _has_begun(run, stage)
        runner = StageJob(plan, run, stage, interrupts, restarts)
        # Asked once the runner listens for it.
        if read_ledger(run).cancelled:
            log.append("stage_stopped", stage, job=this_job(), message="the run was stopped before it began")
            status = "cancelled"
        else:
            _check_progress(plan, run, stage)
            status, message = runner.run()
            if status == "stopped" and runner.cancelled:
                status = "cancelled"
    except Exception as error:
        status, message = "failed", f"stage {stage} failed\n{failure_text(error)}"
        log.append("stage_failed", stage, message=message, job=this_job())
    if status == "failed":
        print(f"posttrain: {message}", flush=True)
    _see_to_others(run, stage, status)
    codes = {"done": EXIT_DONE, "cached": EXIT_DONE, "cancelled": EXIT_INTERRUPTED, "stopped": EXIT_STOPPED}
    return codes.get(status, EXIT_FAILED)


def _see_to_others(run: RunDir, stage: str, status: str) -> None:
    """Tell whom the stage's end concerns: stages that need it, other runs of a sweep, the run as a whole."""
    if status == "stopped":
        return
    if status == "failed":
        why = f"stage {stage} failed"
        _in_spite_of_errors(tell_sharing, run, stage, "stage_cancelled", this_job(), message=why)
        _in_spite_of_errors(cancel_descendants, run, stage, why)
    elif status == "cancelled":
        why = f"run {run.name}, which computed it, was cancelled"
        _in_spite_of_errors(tell_sharing, run, stage, "stage_cancelled", this_job(), message=why)
    else:
        _in_spite_of_errors(tell_sharing, run, stage, "stage_cached", this_job())
    _in_spite_of_errors(settle, run, lambda: frozen_plan(run), own_job=this_job())


def _in_spite_of_errors(act: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Do what follows a stage's end, which stands: whoever looks at the run next sees to what could not be done."""
    try:
        act(*arguments, **options)
    except Exception:
        traceback.print_exc()


def _has_begun(run: RunDir, stage: str) -> bool:
    """Whether an attempt of this job has started the stage."""
    return any(
        event["event"] == "stage_started" and event.get("stage") == stage and event.get("job") == this_job()
        for event in run.events()
    )


def _plan(run: RunDir, stage: str) -> Plan:
    """The frozen plan, in which the stage has the key that it was submitted with.

    Raises:
        StageError: it has another one, so something outside the recipe has changed.
    """
    submitted = {entry["name"]: entry["key"] for entry in run.record()["stages"]}
    if stage not in submitted:
        raise StageError(f"run {run.name} has no stage {stage}", str(run.record_path), "start the run again")
    plan = frozen_plan(run)
    if plan[stage].key != submitted[stage]:
        what = f"an input of stage {stage}, or of one before it, has changed since the run was submitted"
        raise StageError(what, str(run.recipe_path), f"{run.typed('resume')} plans with what is there now")
    return plan


def _cause(code: int) -> str:
    if code == 137:
        return "killed, as the system does with processes that take too much memory (launcher.mem)"
    return f"killed by signal {code - 128}" if code > 128 else "see the job's output"


def _check_progress(plan: Plan, run: RunDir, stage: str) -> None:
    """Raises StageError when the job was requeued too often in a row without its stage coming any further."""
    limit = plan.resolved.frame.launcher.max_requeues_without_progress
    count = requeues_without_progress(run.events(), stage)
    if count > limit:
        what = f"job {this_job()} was requeued {count} times in a row without stage {stage} coming any further"
        fix = f"more time (launcher.stages.{stage}.time), or find what ends it; then {run.typed('resume')}"
        raise StageError(what, "launcher.max_requeues_without_progress", fix)


def requeues_without_progress(events: Iterable[Event], stage: str) -> int:
    """How many of a job's latest attempts in a row came no further than those before them.

    How far an attempt came is what it reported, by unit; one in which posttrain did not even start counts as none.
    """
    best: dict[str, float] = {}
    further, waited, count = False, False, 0
    restarts: int | None = 0
    for event in events:
        kind = event["event"]
        if kind == "run_started":
            # A job that is kept goes on counting where it was; how far another submission came says nothing.
            further, waited, count, restarts = False, False, 0, None
            best.clear()
        if event.get("stage") != stage:
            continue
        if kind == "stage_submitted" and not event.get("kept"):
            restarts = 0
        if kind == "stage_requeued":
            before = 0 if restarts is None else restarts
            now = int(event.get("restarts", before + 1))
            missed = 0 if restarts is None else max(0, now - restarts - 1)
            if not waited:
                count = 0 if further else count + 1
            count += missed
            further, waited, restarts = False, False, now
        if kind == "stage_stopped" and event.get("waiting"):
            waited = True
        for unit, reached in _reached(event).items():
            if reached > best.get(unit, 0.0):
                best[unit], further = reached, True
    return count


def _reached(event: Event) -> dict[str, float]:
    kind = event["event"]
    if kind == "progress":
        return {str(event.get("unit", "step")): float(event["done"])}
    if kind in ("metrics", "stage_stopped") and event.get("step") is not None:
        return {"step": float(event["step"])}
    return {}
