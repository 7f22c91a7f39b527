"""The local launcher: a stage's worker as a child process in a session of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import StageError
from posttrain.launch.job import LOCK, OUTCOME, STOP, Job
from posttrain.pipeline.lock import STALE_SECONDS, Owner, held, holder


class LocalWorker:
    """A started worker.

    The worker does not share the terminal's process group: Ctrl-C reaches the runner alone, which asks the worker to
    stop. Its stdin is a pipe that only the runner holds, so it learns when the runner dies.
    """

    def __init__(self, process: subprocess.Popen[bytes], work_dir: Path) -> None:
        self.process = process
        self.work_dir = work_dir

    @classmethod
    def start(cls, job: Job, work_dir: Path) -> LocalWorker:
        """Write the job, clear what an earlier attempt left, start the process."""
        job.write(work_dir)
        (work_dir / STOP).unlink(missing_ok=True)
        (work_dir / OUTCOME).unlink(missing_ok=True)
        if job.debug.get("inline"):
            # The terminal is the stage's: its debugger reads from it, and Ctrl-C reaches both.
            command = worker_command(work_dir)[:-1]
            return cls(subprocess.Popen(command, env=child_environment() | {"POSTTRAIN_PDB": "1"}), work_dir)
        log = Path(job.log) if job.log is not None else Path(os.devnull)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(
                worker_command(work_dir),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=child_environment(),
            )
        return cls(process, work_dir)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, seconds: float) -> int | None:
        """Exit code if the worker ends within that time, else None."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Ask the stage to save its state and end."""
        (self.work_dir / STOP).touch()

    def kill(self) -> None:
        """End the worker and its children at once; what it has saved can be resumed."""
        if self.process.poll() is None:
            if os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()


def worker_command(work_dir: Path) -> list[str]:
    """The command line of a worker that ends with this process."""
    return [sys.executable, "-m", "posttrain", "worker", str(work_dir), "--watch-stdin"]


def child_environment() -> dict[str, str]:
    """The environment, with this checkout importable: the command may run from another folder and not be installed."""
    environment = dict(os.environ)
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").exists():
        paths = [str(root), str(root / "kernels"), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def end_orphan(work_dir: Path, patience: float = 20.0) -> None:
    """Wait for a worker whose runner is gone (it ends by itself), then end it by pid and start time.

    A worker on another machine is waited for, until its lock is stale.

    Raises:
        StageError: the lock is still held although its owner is gone.
    """
    lock = work_dir / LOCK
    deadline = time.monotonic() + patience
    while held(lock) and time.monotonic() < deadline:
        time.sleep(0.1)
    owner = holder(lock)
    if owner is not None:
        kill_process(owner)
    deadline = time.monotonic() + (5.0 if owner is None or owner.here else 2 * STALE_SECONDS)
    while held(lock):
        if time.monotonic() > deadline:
            what = f"{lock} is still held, by {owner or 'a process'} that cannot be ended from here"
            raise StageError(what, str(lock), "end it where it runs, then: posttrain resume")
        time.sleep(0.05)


def kill_process(owner: Owner) -> bool:
    """SIGKILL to a worker's session if it is still that very process; true when it was."""
    if not owner.alive():
        return False
    try:
        if os.getpgid(owner.pid) == owner.pid:
            os.killpg(owner.pid, signal.SIGKILL)
        else:
            os.kill(owner.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
