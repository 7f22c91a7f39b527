"""Ends a process that hangs, and says where: a lost collective or a dead file system costs minutes and not a week."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext

log = logging.getLogger(__name__)


class Watchdog:
    """Inside `with`, whoever works calls `beat` at every unit; if none comes for `seconds`, the process is ended.

    Where every thread stands is written to `hang_rankN.txt` in the stage's work folder first. The stage has then
    failed, and goes on from its newest checkpoint when the run is resumed. It looks from a thread of its own, so that
    it also sees a main thread that waits for a device or another rank for ever.

    Args:
        seconds: 0 never ends anything.
    """

    def __init__(self, ctx: StageContext, seconds: float) -> None:
        self.ctx, self.seconds = ctx, seconds
        self._last, self._doing = time.monotonic(), "starting"
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, doing: str) -> None:
        """Say that work goes on, and on what: the start of the next unit."""
        self._last, self._doing = time.monotonic(), doing

    def __enter__(self) -> Self:
        self.beat("starting")
        if self.seconds > 0:
            self._done.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent >= self.seconds:
                self._end(silent)
                return

    def _end(self, silent: float) -> None:
        path = self.ctx.work_dir / f"hang_rank{self.ctx.rank}.txt"
        with contextlib.suppress(OSError):  # a disk that is gone must not keep what hangs on it alive
            _write_stacks(path)
        setting = f"stages.{self.ctx.name}.hang_seconds"
        error = StageError(
            f"rank {self.ctx.rank} has made no progress for {silent:.0f} s ({self._doing}); where its threads stand is "
            f"in {path}",
            where=f"stages.{self.ctx.name}",
            fix=f"resume the run; if the work does take so long, {setting}={4 * self.seconds:g}",
        )
        if self.ctx.abandon is None:
            log.error("%s", error)
            return
        self.ctx.abandon(error)


def _write_stacks(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
