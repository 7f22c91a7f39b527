"""Follow a submitted run to its end, and stop one: what `posttrain run` and `posttrain cancel` do with a cluster."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

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


def follow(run: RunDir, display: Display, beside: Sequence[RunDir] = ()) -> RunResult:
    """Show a submitted run until it ends. The first Ctrl-C cancels it gracefully, the second leaves it as it is.

    Args:
        beside: runs that the first Ctrl-C cancels too, such as the further points of a sweep.
    """
    reader, state = EventReader(run.events_path), RunState()
    asked = time.monotonic()
    old, obeyed = True, 0
    with Interrupts() as interrupts:
        while True:
            for event in reader.poll():
                state.update(event)
                if not old:
                    display.event(event, state)
            old = False
            if state.exit_code is not None:
                return _result(run, state)
            # A run that somebody has cancelled already: the first Ctrl-C is for leaving it.
            if interrupts.count > 1 or (state.stop_requested and interrupts.count > obeyed):
                left = f"left run {run.name} as it is; see: {run.typed('status')}"
                return RunResult(run, EXIT_INTERRUPTED, left)
            if interrupts.count and not state.stop_requested:
                display.note("stopping: running stages save their state first (Ctrl-C again leaves at once)")
                obeyed = 1
                for one in _ask([run, *beside], now=False):
                    _press_on(one, display, cancelled=True)
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
        message = f"continue with: {run.typed('resume')}"
    return RunResult(run, state.exit_code or 0, message, report, followed=True)


def request(*runs: RunDir, now: bool = False) -> None:
    """Ask submitted runs to stop: say so in their events, and see to their jobs."""
    for run in _ask(runs, now=now):
        press(run, now=now)


def _ask(runs: Iterable[RunDir], *, now: bool) -> list[RunDir]:
    """Write down that those of the runs which are not over shall stop; returns them.

    Of all before any job is cancelled: a run of a sweep whose shared job is cancelled would else have failed.
    """
    going = [run for run in runs if read_ledger(run).finished is None]
    for run in going:
        EventLog(run.events_path).append("stop_requested", source="cancel", now=now)
    return going


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
        _tell_sharing(run, jobs)
        return ledger
    waiting = {stage: job for stage, job in jobs.items() if there[job] == "PENDING"}
    scancel(waiting.values(), "--state=PENDING")
    _tell_sharing(run, waiting)
    for folder in work_dirs_of(run):
        if held(folder / LOCK):
            (folder / STOP).touch()
    return ledger


def _tell_sharing(run: RunDir, jobs: Mapping[str, str]) -> None:
    """Tell the other runs of a sweep, which wait for these jobs too, that they are cancelled."""
    for stage, job in jobs.items():
        message = f"run {run.name}, which was to compute it, was cancelled"
        tell_sharing(run, stage, "stage_cancelled", job, message=message)


def cancel(*runs: RunDir, now: bool = False) -> None:
    """Stop submitted runs and wait until they have."""
    request(*runs, now=now)
    left = list(runs)
    while left := [run for run in left if not _over(run)]:
        time.sleep(1.0)
        for run in left:
            press(run, now=now)


def _over(run: RunDir) -> bool:
    ledger = settle(run, lambda: frozen_plan(run), patience=0.5)
    return ledger.finished is not None or not ledger.left
