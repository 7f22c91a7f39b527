"""Live progress of a run: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

from posttrain.pipeline.events import Event
from posttrain.pipeline.plan_text import big_number, duration
from posttrain.pipeline.progress import RunState, StageState

PLAIN_SECONDS = 5.0
REDRAW_SECONDS = 0.1


class Live:
    """Shows a run's events as they come (`posttrain.pipeline.runner.Display`)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self._shown = 0.0
        self._open_line = False

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._erase()

    def event(self, event: Event, state: RunState) -> None:
        """One event has come."""
        stage = state.stages.get(event["stage"]) if event.get("stage") is not None else None
        if stage is None:
            return
        if event["event"] in ("progress", "metrics"):
            self._progress(stage)
        elif (text := _milestone(event, stage)) is not None:
            self.note(text)
            self._shown = time.monotonic()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def _progress(self, stage: StageState) -> None:
        now = time.monotonic()
        if now - self._shown < (REDRAW_SECONDS if self.terminal else PLAIN_SECONDS) or not stage.unit:
            return
        self._shown = now
        if not self.terminal:
            self.note(progress_line(stage))
            return
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[2K{progress_line(stage)[:width]}")
        self.stream.flush()
        self._open_line = True

    def _erase(self) -> None:
        if self._open_line:
            self.stream.write("\r\x1b[2K")
            self._open_line = False


def progress_line(stage: StageState) -> str:
    """`distill  step 12/40  1.3/s  ETA 21s  loss 2.871`."""
    parts = [stage.name, f"{stage.unit} {stage.done:g}/{stage.total:g}"]
    if stage.rate is not None:
        parts.append(f"{big_number(round(stage.rate, 2))}/s")
    if stage.eta is not None:
        parts.append(f"ETA {duration(stage.eta)}")
    if stage.loss is not None:
        parts.append(f"loss {stage.loss:.4g}")
    return "  ".join(parts)


def _milestone(event: Event, stage: StageState) -> str | None:
    kind = event["event"]
    if kind == "stage_cached":
        return f"{stage.name}: in the store"
    if kind == "stage_started":
        again = f" (attempt {stage.attempts})" if stage.attempts > 1 else ""
        return f"{stage.name}: started{again}"
    if kind == "stage_finished":
        return f"{stage.name}: done in {duration(event.get('seconds'))}"
    if kind == "stage_stopped":
        step = event.get("step")
        return f"{stage.name}: stopped{f' at {step}' if step is not None else ''}, resumable"
    if kind == "stage_requeued":
        return f"{stage.name}: requeued (restart {event['restarts']} of job {event['job']})"
    if kind == "stage_cancelled":
        return f"{stage.name}: cancelled, {event['message']}"
    return f"{stage.name}: failed" if kind == "stage_failed" else None
