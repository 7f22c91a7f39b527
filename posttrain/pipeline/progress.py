"""From events to the state of every stage: what `status` and the live line show."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from posttrain.pipeline.events import Event

_WINDOW = 40

ENDS = {
    "stage_finished": "done",
    "stage_stopped": "stopped",
    "stage_failed": "failed",
    "stage_cancelled": "cancelled",
}
"""Events that end an attempt, and the status after them."""


@dataclass
class StageState:
    """How far one stage is.

    Attributes:
        status: "waiting", "cached", "queued", "running", "done", "stopped", "failed" or "cancelled".
        job, node: id of its Slurm job, and the machine it was started on; "" where there is none.
        done, total, unit: the last progress reported in this attempt.
        rate: units a second over the latest reports, None while unknown; `eta`: seconds left, likewise.
        loss: the last loss logged; `seconds`: duration of a finished stage, all attempts together.
    """

    name: str
    status: str = "waiting"
    attempts: int = 0
    pid: int | None = None
    job: str = ""
    node: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    loss: float | None = None
    step: int | None = None
    seconds: float = 0.0
    message: str = ""
    started: float | None = None
    _points: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    @property
    def rate(self) -> float | None:
        if len(self._points) < 2:
            return None
        (first_time, first), (last_time, last) = self._points[0], self._points[-1]
        return (last - first) / (last_time - first_time) if last > first and last_time > first_time else None

    @property
    def eta(self) -> float | None:
        rate = self.rate
        return (self.total - self.done) / rate if rate and self.total >= self.done else None

    def update(self, event: Event) -> None:
        """Take in one event of this stage."""
        kind = event["event"]
        if kind == "stage_submitted" and self.status == "running" and str(event.get("job")) == self.job:
            pass  # a job that was there before is kept, and goes on
        elif kind in ("stage_submitted", "stage_requeued"):
            self._leave_off(event["time"])
            self.status, self.message = "queued", ""
            self.job, self.node = str(event.get("job") or self.job), ""
        elif kind == "stage_started":
            self.status, self.message = "running", ""
            self.attempts = int(event.get("attempt", self.attempts + 1))
            self.pid, self.started = event.get("pid"), event["time"]
            self.job, self.node = str(event.get("job") or ""), str(event.get("node") or "")
            self.done, self.total, self.unit = 0, 0, ""
            self._points.clear()
        elif kind == "progress":
            self._progress(event)
        elif kind == "metrics":
            self.step = event.get("step", self.step)
            self.loss = event.get("loss", self.loss)
        elif kind == "stage_cached":
            self.status = "cached" if self.status in ("waiting", "queued") else self.status
        elif kind in ENDS:
            self._end(event)

    def _progress(self, event: Event) -> None:
        unit = str(event.get("unit", "step"))
        if unit != self.unit or event["done"] < self.done:
            # A stage may report one loop after another: a rate over two of them means nothing.
            self._points.clear()
        self.done, self.total, self.unit = event["done"], event["total"], unit
        self.loss = event.get("loss", self.loss)
        self._points.append((event["time"], event["done"]))

    def _end(self, event: Event) -> None:
        # A job that is to be requeued waits in the queue as if it had been submitted again.
        self.status = "queued" if event.get("requeue") else ENDS[event["event"]]
        self.message = str(event.get("message", ""))
        self.step = event.get("step", self.step)
        self._leave_off(event["time"])

    def _leave_off(self, time: float) -> None:
        """No process computes it any more."""
        self.pid = None
        if self.started is not None:
            self.seconds += max(0.0, time - self.started)
            self.started = None


@dataclass
class RunState:
    """State of a run and of its stages, fed with events in order."""

    stages: dict[str, StageState] = field(default_factory=dict)
    status: str = "unknown"
    exit_code: int | None = None
    stop_requested: bool = False

    def update(self, event: Event) -> None:
        """Take in one event."""
        kind, stage = event["event"], event.get("stage")
        if kind == "stage_submitted" and self.status != "queued":
            self.status, self.exit_code, self.stop_requested = "queued", None, False
        if stage is not None:
            self.stages.setdefault(stage, StageState(stage)).update(event)
        elif kind == "run_started":
            self.status, self.exit_code, self.stop_requested = "running", None, False
        elif kind == "run_finished":
            self.status, self.exit_code = event.get("status", "unknown"), event.get("exit")
        if kind == "stop_requested":
            self.stop_requested = True


def state_of(events: Iterable[Event], names: Iterable[str] = ()) -> RunState:
    """The state after these events; `names` fixes the stages' order."""
    state = RunState({name: StageState(name) for name in names})
    for event in events:
        state.update(event)
    return state
