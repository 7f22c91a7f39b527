"""A pool of processes for functions that what a model wrote may make hang, crash or eat memory.

Work goes to a worker in chunks, results come back one by one: the deadline and the blame are the single item's. A
worker whose item is late, or that died, is killed and replaced, and the rest of its chunk goes to another. No signal
handler is used, so it works in any thread. Workers are fresh processes (no fork of one that runs torch's threads), get
no environment but what is named, and die with the process that owns the pool.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Literal, Self

from posttrain.errors import StageError

STARTING_SECONDS = 120.0
"""A new worker imports what it needs first."""

MOST_IN_CHUNK = 32
LONGEST_REPLY = 1 << 26
LOST_IN_A_ROW = 3
"""Workers that may die one after the other with no item in hand."""

PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""Variables that a worker gets: none that holds a secret."""


@dataclass(frozen=True)
class Job:
    """One call: `function` is "module:function", `arguments` can be pickled, `seconds` is its deadline."""

    function: str
    arguments: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its value (JSON-able), or why there is none.

    timeout: it was late, or raised TimeoutError. crashed: its process died. error: it raised.
    """

    status: Literal["value", "timeout", "crashed", "error"]
    value: Any = None
    message: str = ""


class Pool:
    """Runs jobs in processes of its own; `with` ends them. One `run` at a time, from whatever thread.

    Args:
        workers: processes side by side.
        prepare: modules that each imports, or functions ("module:function") that it calls, before its first job.
        memory_mb: address space of each, MiB; None = no limit.
        environment: variables of the workers besides those that Python needs; None: `PASSED_ON`.
        where: names the pool in errors.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        prepare: Sequence[str] = (),
        memory_mb: int | None = None,
        environment: Mapping[str, str] | None = None,
        where: str = "rewards",
    ) -> None:
        self.size = workers
        self.where = where
        self._command = [str(memory_mb or 0), *prepare]
        self._environment = environment
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Start all workers and wait until they can work. Raises StageError when they cannot be started."""
        with self._lock:
            self._fill(self.size)
            while not all(worker.ready for worker in self._workers):
                self._step(_Round([]))

    def run(self, jobs: Sequence[Job], at_step: Callable[[], None] = lambda: None) -> list[Outcome]:
        """What became of each job, in order.

        Args:
            at_step: called whenever some were done, or a deadline has passed: work goes on.

        Raises:
            StageError: workers cannot be started, or a job raised one: then no answer can be scored.
        """
        with self._lock:
            current = _Round(jobs)
            self._fill(min(self.size, len(jobs)))
            try:
                while current.left:
                    self._step(current)
                    at_step()
            except BaseException:
                self._end()  # their replies would be taken for those of the next round
                raise
            return current.results

    def close(self) -> None:
        """End all workers, whatever they do."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _fill(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self._command, self._environment, self.where))

    def _step(self, current: _Round) -> None:
        """Hand out work, wait for the next reply or deadline, and settle what came of it."""
        for worker in [worker for worker in self._workers if worker.ready and not worker.mine]:
            share = -(-len(current.waiting) // (4 * self.size))
            if share and not worker.take(current, min(share, MOST_IN_CHUNK)):
                self._replace(worker, current, "crashed")
        busy = [worker for worker in self._workers if worker.mine or not worker.ready]
        until = min((worker.deadline(current) for worker in busy), default=time.monotonic())
        readable = set(wait([worker.line for worker in busy], max(0.0, until - time.monotonic())))
        for worker in busy:
            if worker.line in readable:
                if not self._read(worker, current):
                    self._replace(worker, current, "crashed")
            elif time.monotonic() >= worker.deadline(current) and not worker.line.poll():
                self._replace(worker, current, "timeout")

    def _read(self, worker: _Worker, current: _Round) -> bool:
        """Settle all that a worker has sent; False if it died."""
        try:
            while worker.line.poll():
                reply = worker.line.recv_bytes(LONGEST_REPLY)
                worker.since = time.monotonic()
                if worker.ready:
                    current.settle(worker.mine.popleft(), _outcome(reply, self.where))
                    current.lost = 0
                worker.ready = True
        except (EOFError, OSError, IndexError, ValueError):
            return False
        return True

    def _replace(self, worker: _Worker, current: _Round, status: Literal["timeout", "crashed"]) -> None:
        said = worker.last_words()
        worker.kill()
        self._workers.remove(worker)
        if not worker.ready:
            raise StageError(
                f"a process that scores answers did not start: {said or status}",
                self.where,
                "look at what it says; more memory for it, or fewer workers, if it was killed",
            )
        current.blame(worker.mine, status, self.where)
        self._fill(len(self._workers) + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Round:
    """The jobs of one `run`: which wait, and what became of the others."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.waiting = deque(range(len(jobs)))
        self.results: list[Any] = [None] * len(jobs)
        self.left = len(jobs)
        self.lost = 0

    def settle(self, index: int, outcome: Outcome) -> None:
        self.results[index] = outcome
        self.left -= 1

    def blame(self, chunk: deque[int], status: Literal["timeout", "crashed"], where: str) -> None:
        """A worker is gone: its first item is at fault, the others wait again."""
        if chunk:
            self.settle(chunk.popleft(), Outcome(status))
            self.waiting.extendleft(reversed(chunk))
            return
        self.lost += 1
        if self.lost >= LOST_IN_A_ROW:
            raise StageError("processes that score answers die without work", where, "is memory short on this machine?")


class _Worker:
    """One process with its line, the items in its hands, and when it took up the first of them."""

    def __init__(self, command: list[str], environment: Mapping[str, str] | None, where: str) -> None:
        self.line, theirs = Pipe()
        lifeline, kept = os.pipe()
        self.lifeline = os.fdopen(kept, "wb")
        self.errors = tempfile.TemporaryFile()
        self.ready = False
        self.mine: deque[int] = deque()
        self.since = time.monotonic()
        descriptors = [str(theirs.fileno()), str(lifeline)]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "posttrain.rewards.worker", *descriptors, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self.errors,
                env=_environment(environment),
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
            )
        except OSError as error:
            raise StageError(f"a process that scores answers cannot be started: {error}", where) from error
        finally:
            theirs.close()
            os.close(lifeline)

    def take(self, current: _Round, count: int) -> bool:
        """Hand it the next items; False if it has died."""
        chunk = [current.waiting.popleft() for _ in range(count)]
        jobs = [(current.jobs[index].function, current.jobs[index].arguments) for index in chunk]
        try:
            self.line.send_bytes(pickle.dumps(jobs))
        except OSError:
            current.waiting.extendleft(reversed(chunk))
            return False
        self.mine.extend(chunk)
        self.since = time.monotonic()
        return True

    def deadline(self, current: _Round) -> float:
        """When what it does now is late, by `time.monotonic`."""
        seconds = current.jobs[self.mine[0]].seconds if self.mine else STARTING_SECONDS
        return self.since + seconds

    def last_words(self) -> str:
        """The last line it wrote before it could work."""
        self.errors.seek(0)
        return (self.errors.read().decode(errors="replace").strip().splitlines() or [""])[-1]

    def kill(self) -> None:
        """End it with its children, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)  # its number is not given away before `wait`
        except ProcessLookupError:
            pass
        self.process.wait()
        self.line.close()
        self.lifeline.close()
        self.errors.close()


def _environment(chosen: Mapping[str, str] | None) -> dict[str, str]:
    given = {name: os.environ[name] for name in PASSED_ON if name in os.environ} if chosen is None else dict(chosen)
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    # One thread each: the workers are as many as are wanted. The seed of hashes decides the order of sets in sympy.
    fixed = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return {**given, **fixed, "PYTHONPATH": path}


def _outcome(reply: bytes, where: str) -> Outcome:
    said = json.loads(reply)
    if said["status"] == "refused":
        what, place, fix = said["value"]
        raise StageError(what, place or where, fix)
    return Outcome(said["status"], said.get("value"), said.get("message", ""))
