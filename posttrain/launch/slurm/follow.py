"""Follow a submitted run to its end, and stop one: what `posttrain run` and `posttrain cancel` do with a cluster."""

from __future__ import annotations

import time

from posttrain.errors import EXIT_DONE, EXIT_INTERRUPTED, StageError
from posttrain.launch.job import LOCK, STOP, work_dirs_of
from posttrain.launch.signals import Interrupts
from posttrain.launch.slurm.commands import queued, scancel
from posttrain.launch.slurm.ledger import Ledger, read_ledger, settle, tell_sharing
from posttrain.pipeline.events import EventLog, EventReader
from posttrain.pipeline.execution import RunResult
from posttrain.pipeline.frozen import frozen_plan
from posttrain.pipeline.lock import held
from posttrain.pipeline.progress import RunState
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.stage_runner import Display

POLL_SECONDS = 0.3
ASK_SECONDS = 15.0
"""How often Slurm is asked whether the jobs are still there; everything else comes from the events."""
PRESS_SECONDS = 3.0


def follow(run: RunDir, display: Display) -> RunResult:
    """Show a submitted run until it ends. The first Ctrl-C cancels it gracefully, the second leaves it as it is."""
    reader, state = EventReader(run.events_path), RunState()
    asked = time.monotonic()
    old = True
    with Interrupts() as interrupts:
        while True:
            for event in reader.poll():
                state.update(event)
                if not old:
                    display.event(event, state)
            old = False
            if state.exit_code is not None:
                return _result(run, state)
            if interrupts.count > 1:
                left = f"left run {run.name} as it is; see: posttrain status {run.name}"
                return RunResult(run, EXIT_INTERRUPTED, left)
            if interrupts.count and not state.stop_requested:
                display.note("stopping: running stages save their state first (Ctrl-C again leaves at once)")
                EventLog(run.events_path).append("stop_requested", source="cancel", now=False)
                _press_on(run, display, cancelled=True)
            elif time.monotonic() - asked > (PRESS_SECONDS if state.stop_requested else ASK_SECONDS):
                asked = time.monotonic()
                _press_on(run, display, cancelled=state.stop_requested)
            time.sleep(POLL_SECONDS)


def _press_on(run: RunDir, display: Display, *, cancelled: bool) -> None:
    try:
        if cancelled:
            press(run)
        settle(run, lambda: frozen_plan(run), patience=0.5)
    except StageError as error:
        display.note(f"Slurm does not answer ({error.problems[0].what}); asking again")


def _result(run: RunDir, state: RunState) -> RunResult:
    failed = [stage.message for stage in state.stages.values() if stage.status == "failed"]
    report = run.report_path if state.exit_code == EXIT_DONE and run.report_path.exists() else None
    message = failed[-1] if failed else ""
    if state.status == "stopped":
        message = f"continue with: posttrain resume {run.name}"
    return RunResult(run, state.exit_code or 0, message, report, followed=True)


def request(run: RunDir, *, now: bool = False) -> None:
    """Ask a submitted run to stop: say so in its events, and see to its jobs."""
    EventLog(run.events_path).append("stop_requested", source="cancel", now=now)
    press(run, now=now)


def press(run: RunDir, *, now: bool = False) -> Ledger:
    """Cancel what waits in the queue and tell what runs; to be repeated until nothing is left. Returns what there is.

    A stage that was just being requeued when it was told waits in the queue again.
    """
    ledger = read_ledger(run)
    there = queued(patience=10.0)
    jobs = {stage: job for stage, job in ledger.jobs.items() if job in there}
    if now:
        scancel(jobs.values(), "--full", "--signal=KILL")
        scancel(jobs.values())
        return ledger
    waiting = {stage: job for stage, job in jobs.items() if there[job] == "PENDING"}
    scancel(waiting.values(), "--state=PENDING")
    for stage, job in waiting.items():
        # Other runs of a sweep wait for it too.
        message = f"run {run.name}, which was to compute it, was cancelled"
        tell_sharing(run, stage, "stage_cancelled", job, message=message)
    for folder in work_dirs_of(run):
        if held(folder / LOCK):
            (folder / STOP).touch()
    return ledger


def cancel(run: RunDir, *, now: bool = False) -> Ledger:
    """Stop a submitted run and wait until it has; its ledger."""
    request(run, now=now)
    while True:
        ledger = settle(run, lambda: frozen_plan(run), patience=0.5)
        if ledger.finished or not ledger.left:
            return ledger
        time.sleep(1.0)
        press(run, now=now)
