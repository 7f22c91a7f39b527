"""Scores of answers to generated tasks, by the task's own `score_answer`, in a process that may hang without harm."""

from __future__ import annotations

import math
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from posttrain.data.tasks import generator_of

SECONDS = 10.0
STARTING_SECONDS = 120.0
"""A new process imports `reasoning_gym` and all that it needs first."""


class Scorer:
    """Scores answers one after the other in a process of its own; `with` ends it.

    A process whose answer does not come in time is killed and replaced: `score_answer` may parse, evaluate or search
    what a model wrote. No signal is used, so it works in any thread.

    Args:
        seconds: time for one answer.

    Attributes:
        timed_out, failed: answers so far that took too long, and that made `score_answer` raise.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.timed_out = self.failed = 0
        self._process: BaseProcess | None = None
        self._line: Connection | None = None

    def score(self, task: dict[str, Any], answer: str) -> float | None:
        """The score of an answer, 0 to 1; None if there is none, because scoring it took too long or failed.

        Args:
            task: a row's `task`, see `posttrain.data.tasks`.
        """
        line = self._connection()
        line.send((task, answer))
        if not line.poll(self.seconds):
            self.timed_out += 1
            self.close()
            return None
        try:
            score = line.recv()
        except EOFError:  # the process died: out of memory, a crash of an extension
            score = None
            self.close()
        if score is None or not math.isfinite(score):
            self.failed += 1
            return None
        return score

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
        self._process = self._line = None

    def _connection(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            # Spawned: a fork of a process that runs torch's threads may hang by itself.
            context = multiprocessing.get_context("spawn")
            self._line, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            if not self._line.poll(STARTING_SECONDS):
                self.close()
                raise TimeoutError("the process that scores answers did not start")
            self._line.recv()
        return self._line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _serve(line: Connection) -> None:
    import reasoning_gym  # noqa: F401  (before the first answer's time begins)

    line.send("ready")
    while True:
        try:
            task, answer = line.recv()
        except EOFError:
            return
        try:
            generator = generator_of(task)
            score = float(generator.score_answer(answer, generator[task["index"]]))
        except Exception:  # noqa: BLE001  (what a task's own code may raise has no common base)
            score = None
        line.send(score)
