"""The trainer that training stages share: transformers' loop with our checkpoints, stops, precision and history."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.training import checkpoints
from posttrain.training.callbacks import StageCallback, history_row

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


class StageTrainer(Trainer):
    """transformers' `Trainer` for a stage: resumes exactly, stops on request, never goes on with a NaN.

    Subclasses override `compute_loss` and return this micro-batch's share of the optimiser step's loss: nothing is
    divided by the number of micro-batches afterwards. The dataset holds the sequences of all steps in the order they
    are used, so that the order depends neither on the micro-batch nor on where a run was interrupted.

    Parameters stay fp32; with `precision="bf16"` the loss is computed under autocast.
    """

    def __init__(
        self,
        ctx: StageContext,
        model: PreTrainedModel,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        data_collator: Callable[[list[Any]], dict[str, Any]],
        *,
        tokens_per_step: int,
        precision: str = "fp32",
        save_every: int = 0,
        save_seconds: float = 600.0,
        keep_checkpoints: int = 2,
    ) -> None:
        self.ctx = ctx
        self.precision = precision
        self.keep_checkpoints = keep_checkpoints
        self.watch = StageCallback(ctx, tokens_per_step, save_every, save_seconds)
        self._parts: dict[str, Tensor] = {}
        self._step_loss: Tensor | float = 0.0
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, callbacks=[self.watch]
        )
        if use_cache is not None:
            # transformers switches it off for training and would have it saved with the model.
            model.config.use_cache = use_cache
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # Both say that the loss is already that of the whole step (5.17 reads the first, 5.23 the second).
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def fit(self) -> list[dict[str, float]]:
        """Train from the newest complete checkpoint to the end and return the history of all steps.

        Raises:
            StopRequested: a stop was asked for; the state is saved.
            StageError: the loss or its gradient is not a number.
        """
        newest = checkpoints.newest_complete(self.ctx.checkpoint_dir, log.warning)
        if self.ctx.should_stop():
            self.ctx.stop(checkpoints.step_of(newest) if newest else 0)
        if newest is not None:
            log.warning("going on from step %d", checkpoints.step_of(newest))
        self.train(resume_from_checkpoint=str(newest) if newest else None)
        if self.watch.stopped:
            self.ctx.stop(self.state.global_step)
        return [history_row(entry) for entry in self.state.log_history if "loss" in entry]

    def record_parts(self, **parts: Tensor) -> None:
        """Add this micro-batch's share of further numbers that the step's log shall show beside the loss."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.precision == "bf16":
            stack.enter_context(torch.autocast(self.args.device.type, dtype=torch.bfloat16))
        return stack

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            total, self._step_loss = self._step_loss, 0.0
            self._refuse_nan("loss", float(total))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._refuse_nan("gradient norm", float(grad_norm))
        return grad_norm

    def _refuse_nan(self, name: str, value: float) -> None:
        """Stop before the optimiser step, so that no checkpoint ever holds weights made from it."""
        if math.isfinite(value):
            return
        step = self.state.global_step + 1
        stage = f"stages.{self.ctx.name}"
        raise StageError(
            f"the {name} is {value} at step {step}; the weights before it are kept",
            where=stage,
            fix=f"a lower rate ({stage}.lr={self.args.learning_rate / 4:g}), a longer warm-up "
            f"({stage}.warmup_ratio=0.1) or {stage}.precision=fp32",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: float(value) for name, value in self._parts.items()})
            self._parts.clear()
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return len(batch_samples)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        path = checkpoints.begin(folder, self.state.global_step)
        super()._save_checkpoint(model, trial)
        checkpoints.complete(path)
        checkpoints.rotate(folder, self.keep_checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The parameters under their own names: `save_pretrained` may rename them, and loading would not notice."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / WEIGHTS), metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `_save` wrote them; a missing or unexpected name is an error, where transformers would only warn."""
        load_model(model if model is not None else self.model, Path(resume_from_checkpoint) / WEIGHTS, strict=True)
