"""The worker: the process that runs one stage in one work folder (`python -m posttrain worker WORKDIR`)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from posttrain.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    StageError,
    StopRequested,
)
from posttrain.launch.job import LOCK, OUTCOME, STOP, Job, describe_failure, write_outcome
from posttrain.pipeline.disk import free_reserve, keep_reserve
from posttrain.pipeline.lock import Lock, LockHeld

GRACE_SECONDS = 15.0
"""How long a worker whose runner died may go on to save its state."""


def main(work_dir: Path, *, watch_stdin: bool = False) -> int:
    """Run the job of a work folder; returns the exit code (0 done, 1 failed, 75 stopped and resumable).

    Args:
        watch_stdin: stdin is a pipe held by the runner; the worker stops when it closes.

    Raises:
        StageError: there is no job, or another worker has the folder.
    """
    job = Job.read(work_dir)
    try:
        lock = Lock.acquire(work_dir / LOCK, on_lost=_give_up)
    except LockHeld as error:
        raise StageError(str(error), fix="wait for it, or end it with posttrain cancel") from error
    with lock:
        (work_dir / OUTCOME).unlink(missing_ok=True)
        if job.log is not None:
            redirect_output(Path(job.log))
        signal.signal(signal.SIGTERM, lambda *_: (work_dir / STOP).touch())
        if watch_stdin:
            stop_when_closed(sys.stdin.fileno(), work_dir)
        return run_job(job, work_dir, lock)


def _give_up() -> None:
    """The work folder is another worker's, or gone: whatever this one wrote from now on would be in the way."""
    print("posttrain: the work folder was taken over or removed; this worker ends", flush=True)
    os._exit(EXIT_INTERRUPTED)


def run_job(job: Job, work_dir: Path, lock: Lock | None = None) -> int:
    """Execute a job whose work folder this process holds, record the outcome, return the exit code."""
    print(f"posttrain: stage {job.stage} ({job.type}), attempt {job.attempt}, process {os.getpid()}", flush=True)
    keep_reserve(work_dir)
    outcome, code = _attempt(job, work_dir, lock)
    free_reserve(work_dir)
    write_outcome(work_dir, **outcome)
    print(f"posttrain: {outcome['status']} {outcome.get('message', '')}".rstrip(), flush=True)
    return code


def _attempt(job: Job, work_dir: Path, lock: Lock | None) -> tuple[dict[str, Any], int]:
    from posttrain.launch.execute import execute_job

    started = time.time()
    try:
        execute_job(job, work_dir, lock)
    except StopRequested as stop:
        return {"status": "stopped", "step": stop.step}, EXIT_STOPPED
    except Exception as error:
        traceback.print_exc()
        if os.environ.get("POSTTRAIN_PDB") and sys.stdin.isatty():
            import pdb

            pdb.post_mortem(error.__traceback__)
        return {"status": "failed", **describe_failure(error, work_dir)}, EXIT_FAILED
    return {"status": "done", "seconds": time.time() - started}, EXIT_DONE


def redirect_output(log: Path) -> None:
    """Send stdout and stderr of this process and its children, native code included, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def stop_when_closed(descriptor: int, work_dir: Path, grace: float = GRACE_SECONDS) -> threading.Thread:
    """Watch a pipe: when it closes, ask the stage to stop, and end the process after `grace` seconds."""

    def watch() -> None:
        while os.read(descriptor, 1024):
            pass
        if work_dir.exists():
            (work_dir / STOP).touch()
        time.sleep(grace)
        os._exit(EXIT_INTERRUPTED)

    thread = threading.Thread(target=watch, name="runner-watch", daemon=True)
    thread.start()
    return thread
