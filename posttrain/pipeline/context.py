"""What a running stage may use: its config and inputs, where to write, how to report and when to stop."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from posttrain.errors import StopRequested
from posttrain.pipeline.stage import ArtifactMeta


@dataclass(frozen=True)
class InputArtifact:
    """One input of a running stage: its folder, what is known of it, and the reference it came by."""

    path: Path
    meta: ArtifactMeta
    reference: str = ""


@dataclass
class StageContext:
    """Handed to `Stage.run`. Made by the worker; tests make one with `StageContext(...)` and no `emit`.

    A stage is re-entrant: started again in the same `work_dir` it continues from its newest complete checkpoint and
    ends with the same result.
    """

    name: str
    config: Any
    work_dir: Path
    inputs: dict[str, InputArtifact] = field(default_factory=dict)
    seed: int = 0
    device: str = "cpu"
    """"cpu" or "cuda"; already resolved."""
    rank: int = 0
    world_size: int = 1
    strategy: str = "single"
    """How the ranks share a model that is trained, as `engine.strategy` of the recipe."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """`engine.deepspeed` of the recipe: what is laid over DeepSpeed's generated configuration."""
    tracker: dict[str, Any] | None = None
    """The recipe's `tracker` section (`name`, `project`, `mode`) and `dir`, a folder for the tracker's own files that
    outlives the work folder. None: curves stay in the stage's own files."""
    profile: tuple[Path, int] | None = None
    """Folder for a profile of training steps, and how many; None: no profile is taken."""
    emit: Callable[[str, dict[str, Any]], None] | None = None
    """Writes one event; None outside a worker."""
    result: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, Any] = field(default_factory=dict)
    agree: Callable[[Any], Any] | None = None
    """Gives every rank the first one's value (something JSON can hold); None with one rank."""
    abandon: Callable[[Exception], NoReturn] | None = None
    """Records why this process gives up and ends it at once, from any thread; None outside a worker."""
    _last_progress: float = 0.0

    @property
    def checkpoint_dir(self) -> Path:
        return self.work_dir / "checkpoints"

    def output_dir(self, name: str) -> Path:
        """The folder of that output, made if missing. A stage that starts anew should expect leftovers in it."""
        path = self.work_dir / "outputs" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def progress(self, done: float, total: float, unit: str = "step", **values: Any) -> None:
        """Report how far the stage is; cheap enough to call at every unit (events are limited to five a second)."""
        now = time.monotonic()
        if self.emit is None or self.rank or (done < total and now - self._last_progress < 0.2):
            return
        self._last_progress = now
        self.emit("progress", {"done": done, "total": total, "unit": unit, **values})

    def log_metrics(self, step: int, **values: float) -> None:
        """Record numbers at a step. After a resume the same step may come again: readers take the last."""
        if self.rank == 0:
            with (self.work_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if self.emit is not None:
                self.emit("metrics", {"step": step, **values})

    def record_result(self, **metrics: Any) -> None:
        """Numbers that are the same on every run of the same key (bit for bit on CPU); they go into the manifest."""
        self.result.update(metrics)

    def record_timing(self, **metrics: Any) -> None:
        """Numbers that depend on the machine: seconds, rates, memory."""
        self.timing.update(metrics)

    def should_stop(self) -> bool:
        """True when a stop was asked for; look at every unit boundary of every loop, save, then call `stop`.

        With several ranks all must ask together: they are told what the first one saw.
        """
        return self.same((self.work_dir / "STOP").exists())

    def same(self, value: Any) -> Any:
        """The first rank's value on every rank; all must ask together, and none goes on before all have."""
        return value if self.agree is None else self.agree(value)

    def first_does(self, work: Callable[[], Any]) -> Any:
        """Have the first rank do something while the others wait; all get its result (something JSON can hold).

        Inside, that rank may look for a wish to stop by itself; a `stop` stops them all.
        """
        if self.agree is None:
            return work()
        answer: dict[str, Any] = {}
        if self.rank == 0:
            agree, self.agree = self.agree, None
            try:
                answer = {"value": work()}
            except StopRequested as stop:
                answer = {"stop": stop.step}
            finally:
                self.agree = agree
        answer = self.agree(answer)
        if "stop" in answer:
            raise StopRequested(answer["stop"])
        return answer["value"]

    def stop(self, step: int = 0) -> NoReturn:
        """End the stage early after its state was saved; it will be resumed."""
        raise StopRequested(step)
