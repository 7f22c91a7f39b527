"""What happens at every optimiser step: report, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from posttrain.pipeline.context import StageContext


class StageCallback(TrainerCallback):
    """Reports progress and metrics to the stage's context, and asks for a save when one is due or a stop is wanted.

    Args:
        saves_at: whether the state after that step can be resumed from exactly; at others a stop waits.
    """

    def __init__(
        self,
        ctx: StageContext,
        tokens_per_step: int,
        save_every: int,
        save_seconds: float,
        saves_at: Callable[[int], bool] = lambda step: True,
    ) -> None:
        self.ctx = ctx
        self.saves_at = saves_at
        self.tokens_per_step = tokens_per_step
        self.save_every = save_every
        self.save_seconds = save_seconds
        self.stopped = False
        self.seconds = 0.0
        self.steps = 0
        """Training time and optimiser steps of this attempt, without those of attempts before."""
        self._began = self._saved = time.monotonic()
        self._due_since = False

    @property
    def tokens_per_second(self) -> float:
        """Rate of this attempt so far, saves included; 0 before the first step."""
        return self.steps * self.tokens_per_step / self.seconds if self.seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = self._saved = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        now = time.monotonic()
        self.steps += 1
        self.seconds = now - self._began
        last = state.global_step >= state.max_steps
        self._due_since = self._due_since or self._due(state.global_step, now)
        if not self.saves_at(state.global_step):
            return control
        if self.ctx.should_stop():
            self.stopped = control.should_training_stop = control.should_save = True
        elif not last and self.ctx.same(self._due_since):
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        self._due_since = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        row = history_row({**logs, "step": state.global_step})
        step = row.pop("step")
        rate = round(self.tokens_per_second, 1)
        self.ctx.log_metrics(step, **row, tokens_per_second=rate)
        self.ctx.progress(step, state.max_steps, "step", loss=row["loss"], tokens_per_second=rate)

    def _due(self, step: int, now: float) -> bool:
        by_steps = self.save_every > 0 and step % self.save_every == 0
        by_time = self.save_seconds > 0 and now - self._saved >= self.save_seconds
        return by_steps or by_time


class ProfileCallback(TrainerCallback):
    """Records steps with torch's profiler, from the third on, when nothing is compiled or allocated any more.

    Writes `trace.json.gz` (for chrome://tracing or Perfetto) and `operators.txt`, the operators that took longest.
    """

    FIRST = 3

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._profiler: profile | None = None
        self._seen = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._seen += 1
        if self._seen == self.FIRST or (self._seen == 1 and state.max_steps - state.global_step < self.FIRST):
            self._profiler = profile(record_shapes=True, profile_memory=True)
            self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps -= self._profiler is not None
        if self._profiler is not None and (self.steps == 0 or state.global_step >= state.max_steps):
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        assert self._profiler is not None
        found, self._profiler = self._profiler, None
        found.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / "trace.json.gz"))
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=40)
        (self.folder / "operators.txt").write_text(table, encoding="utf-8")


def history_row(entry: dict[str, float]) -> dict[str, float]:
    """A row of a history artifact from an entry of the trainer's log: values that are the same on every run."""
    renamed = {"learning_rate": "lr"}
    kept = {renamed.get(name, name): value for name, value in entry.items() if name not in ("epoch", "total_flos")}
    # Sorted, because the entries of a loaded checkpoint come in another order than those of the running trainer.
    return {"step": kept.pop("step")} | dict(sorted(kept.items()))
