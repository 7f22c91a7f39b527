"""The trainer that training stages share: transformers' loop with our checkpoints, stops, speed and history."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainingArguments

from posttrain.errors import StageError
from posttrain.models.architecture import normalise
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import read_json, write_json
from posttrain.training import checkpoints, distributed, speed
from posttrain.training.arguments import training_arguments
from posttrain.training.callbacks import ProfileCallback, StageCallback, history_row
from posttrain.training.config import TrainingConfig
from posttrain.training.estimate import ActivationPlan, activation_plan
from posttrain.training.graphed import GraphedMicroStep
from posttrain.training.meter import LAG, Meter
from posttrain.training.sharding import make_sharding
from posttrain.training.sharding.layout import require_readable, write_layout
from posttrain.training.sharding.trainer import ShardedTrainer
from posttrain.training.watchdog import Watchdog

log = logging.getLogger(__name__)

STAGE_STATE = "stage_state.json"


class StageTrainer(ShardedTrainer):
    """transformers' `Trainer` for a stage: resumes exactly, stops on request, never keeps a step made from a NaN.

    Subclasses override `compute_loss` and return this micro-batch's share of the optimiser step's loss: nothing is
    divided by the number of micro-batches afterwards. The dataset holds the sequences of all steps in the order they
    are used, so that the order depends neither on the micro-batch nor on where a run was interrupted.

    Parameters stay fp32; with `precision="bf16"` the loss is computed under autocast. On a GPU no step waits for the
    device: numbers are logged up to two steps late (`Meter`), and a step whose loss or gradient is not finite is
    skipped by the optimiser on the device, as are those after it, until the host learns of it. Checkpoints wait for
    all numbers.

    Args:
        tokens_per_step: tokens of one optimiser step, for rates and the size of a micro-batch.
        frozen: further models that `compute_loss` calls; they are made fast as well.
        whole_rows: no row is padded and attention may cross documents, so that no attention mask is needed.
        whole_steps: `training_step` gets all sequences of an optimiser step at once, the same ones on every rank.
        workers: processes that make batches, see `training_arguments`.
        arguments_class, arguments: the class of the trainer's arguments and further fields of it.
        trainer_kwargs: for the next trainer in the method resolution order, see `TrlStageTrainer`.
    """

    def __init__(
        self,
        ctx: StageContext,
        config: TrainingConfig,
        model: PreTrainedModel,
        train_dataset: Dataset[Any],
        data_collator: Callable[[list[Any]], dict[str, Any]] | None,
        *,
        tokens_per_step: int,
        frozen: Sequence[PreTrainedModel] = (),
        whole_rows: bool = False,
        whole_steps: bool = False,
        workers: int = 0,
        arguments_class: type[TrainingArguments] = TrainingArguments,
        arguments: Mapping[str, Any] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        self.ctx, self.config = ctx, config
        self.sharding = make_sharding(ctx)
        self.frozen, self.whole_rows = frozen, whole_rows
        self.watch = StageCallback(ctx, tokens_per_step, config.save_every, config.save_seconds, self.saves_at)
        self.watchdog = Watchdog(ctx, config.hang_seconds)
        self._parts: dict[str, Tensor] = {}
        self._step_loss: Tensor | float = 0.0
        self._skip: Tensor | None = None
        self._graphed: GraphedMicroStep | None = None
        ranks = 1 if whole_steps else ctx.world_size
        micro_batch = config.sequences_per_step if whole_steps else config.micro_batch(ranks)
        accumulation = config.sequences_per_step // (micro_batch * ranks)
        self.micro_batch_tokens = tokens_per_step // (accumulation * ranks)
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=training_arguments(
                ctx,
                config,
                micro_batch,
                accumulation,
                workers=workers,
                arguments_class=arguments_class,
                **(arguments or {}),
            ),
            train_dataset=train_dataset,
            **({} if data_collator is None else {"data_collator": data_collator}),
            callbacks=[self.watch, *([ProfileCallback(*ctx.profile)] if ctx.profile and ctx.rank == 0 else [])],
            **trainer_kwargs,
        )
        self.meter = Meter(lag=0 if self.args.device.type == "cpu" else LAG)
        if use_cache is not None:
            # transformers switches it off for training and would have it saved with the model.
            model.config.use_cache = use_cache
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # Gradients are added in `training_step`; accelerate would wrap the model in DistributedDataParallel.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        # Both say that the loss is already that of the whole step (5.17 reads the first, 5.23 the second).
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def fit(self) -> list[dict[str, float]]:
        """Train from the newest complete checkpoint to the end and return the history of all steps.

        Raises:
            StopRequested: a stop was asked for; the state is saved.
            StageError: the loss or its gradient is not a number.
        """
        newest = self._newest_checkpoint()
        if self.ctx.should_stop():
            self.ctx.stop(checkpoints.step_of(newest) if newest else 0)
        if newest is not None:
            require_readable(newest, self.ctx, self.draws())
            log.warning("going on from step %d", checkpoints.step_of(newest))
        self._step_loss = 0.0
        self._parts.clear()
        self.meter = Meter(self.meter.lag)
        if self._skip is not None:
            self._skip.zero_()
        if newest is not None:
            self._load_stage_state(newest)
        if self.sharding is not None:
            self.sharding.remember(self.model)
        with self.watchdog, self.fast(), self.in_shards():
            self.train(resume_from_checkpoint=str(newest) if newest else None)
        if self.watch.stopped:
            self.ctx.stop(self.state.global_step)
        self.take_whole()
        return [history_row(entry) for entry in self.state.log_history if "loss" in entry]

    def saves_at(self, step: int) -> bool:
        """Whether the state after that optimiser step is all that a resumed run needs."""
        return True

    def draws(self) -> str | None:
        """What training draws from random numbers of each rank, so that other ranks would draw others; or None."""
        return "dropout draws random numbers on every rank" if speed.draws_random(self.model) else None

    def stage_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, optimiser and random numbers; JSON-able, the same on every rank."""
        return {}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        """Go on from what `stage_state` gave."""

    def _load_stage_state(self, checkpoint: Path) -> None:
        path = checkpoint / STAGE_STATE
        if path.is_file():
            self.load_stage_state(read_json(path))

    def _newest_checkpoint(self) -> Path | None:
        """The same on every rank; the first one deletes what cannot be used."""

        def look() -> str | None:
            found = checkpoints.newest_complete(self.ctx.checkpoint_dir, log.warning)
            return str(found) if found is not None else None

        found = self.ctx.first_does(look)
        return Path(found) if found is not None else None

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled on this machine."""
        on_gpu = self.args.device.type == "cuda"
        wanted = self.config.compiles(on_gpu)
        if wanted and self.sharding is not None and not self.sharding.compiles:
            if self.config.compile != "auto":
                where = f"stages.{self.ctx.name}.compile"
                what = f"layers are not compiled with engine {self.sharding.name}, which swaps their weights"
                raise StageError(what, where=where, fix=f"{where}=auto, or engine=fsdp2")
            return False
        return wanted and (self.config.compile != "auto" or speed.can_compile())

    @property
    def captures(self) -> bool:
        """Whether micro-steps are replayed from a CUDA graph.

        Raises:
            StageError: `cuda_graph=on` where that cannot be.
        """
        reasons = {
            "it needs a GPU": self.args.device.type != "cuda",
            "it needs the whole model on every rank": self.sharding is not None,
            "batches differ in shape": not self.whole_rows,
            "the model has dropout": speed.draws_random(self.model),
            "a model reads the device while it computes": any(
                speed.reads_device(model) for model in (self.model, *self.frozen)
            ),
        }
        against = [reason for reason, holds in reasons.items() if holds]
        if self.config.cuda_graph == "on" and against:
            where = f"stages.{self.ctx.name}.cuda_graph"
            raise StageError(f"no CUDA graph of the training step: {against[0]}", where=where, fix=f"{where}=auto")
        # With several ranks graphs ran once, in one recipe on two GPUs: they are for those who ask.
        wanted = self.config.cuda_graph == "on" or (self.config.cuda_graph == "auto" and self.ctx.world_size == 1)
        return wanted and not against

    def activation_plan(self) -> ActivationPlan:
        """What the layers of the trained model keep for the backward pass."""
        config, compiled = self.config, self.compiles
        if config.gradient_checkpointing or config.activation_budget is not None:
            return activation_plan(
                normalise(self.model.config.to_dict()),
                self.micro_batch_tokens,
                config.precision,
                compiled=compiled,
                everything=config.gradient_checkpointing,
                budget=config.activation_budget,
            )
        return ActivationPlan("compiled" if compiled else "eager")

    @contextlib.contextmanager
    def fast(self) -> Any:
        """Inside, the models run as the config says; afterwards they are as before."""
        plan, compiled = self.activation_plan(), self.compiles
        with contextlib.ExitStack() as stack:
            stack.enter_context(speed.attention_backends(self.config.attention, self.args.device.type))
            for model in (self.model, *self.frozen):
                if self.whole_rows:
                    stack.enter_context(speed.causal_without_masks(model))
                if self.config.precision == "bf16" and self.config.residual_dtype == "bfloat16":
                    stack.enter_context(speed.bf16_residual_stream(model))
                trained = plan if model is self.model else ActivationPlan()
                stack.enter_context(
                    speed.fast_layers(
                        model,
                        compiled=compiled,
                        lean=plan.kept == "lean",
                        recomputed=trained.recomputed,
                        recomputed_mlps=trained.recomputed_mlps,
                    )
                )
            if self.captures:
                accumulates = self.args.gradient_accumulation_steps > 1
                self._graphed = GraphedMicroStep(self._loss_and_parts, self.model.parameters(), accumulates)
            try:
                yield
            finally:
                self._graphed = None

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.config.precision == "bf16":
            # Weights cast once and kept would outlive the graph that is captured with them; none is used twice anyway.
            autocast = torch.autocast(self.args.device.type, dtype=torch.bfloat16, cache_enabled=False)
            stack.enter_context(autocast)
        return stack

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: transformers would walk over all parameters at every micro-batch."""
        return 0

    def record_parts(self, **parts: Tensor) -> None:
        """Add this micro-batch's share of further numbers that the step's log shall show beside the loss."""
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if optimizer.defaults.get("fused") and self.sharding is None:
            # Fused optimisers look at this tensor on the device (it is the gradient scaler's) and skip where it is 1.
            self._skip = optimizer.found_inf = torch.zeros((), device=self.args.device)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Not of decays, step biases and skips of state-space layers either: Mamba's own code leaves them alone."""
        from posttrain.models.upcycled.mamba_upcycled import FP32 as without

        return [name for name in super().get_decay_parameter_names(model) if name.rpartition(".")[2] not in without]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.watchdog.beat(f"step {self.state.global_step + 1}")
        if self._graphed is not None:
            model.train()
            loss, parts = self._graphed(self._prepare_inputs(inputs))
            self.record_parts(**parts)
        else:
            if self.sharding is not None:
                self.sharding.before_micro_batch(last=self.accelerator.sync_gradients)
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.ctx.world_size > 1 and self.accelerator.sync_gradients:
            self._add_ranks()
        return loss

    def _add_ranks(self) -> None:
        """After a step's last micro-batch: gradients, loss and parts of all ranks together."""
        if self.sharding is None:
            distributed.add_gradients(self.model.parameters())
        summed = distributed.add_numbers({"loss": self._step_loss, **self._parts}, self.args.device)
        self._step_loss = summed.pop("loss")
        self._parts = summed

    def _loss_and_parts(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's loss and what `compute_loss` recorded beside it."""
        before, self._parts = self._parts, {}
        try:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            return loss, self._parts
        finally:
            self._parts = before

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before the optimiser step, which leaves the weights alone if loss or gradient is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.sharding is not None:
            # What is not finite is seen when it is logged, before a checkpoint could be made of it.
            return grad_norm
        loss = torch.as_tensor(self._step_loss)
        if self._skip is None:
            self._refuse_nan(self.state.global_step + 1, loss=float(loss), grad_norm=float(grad_norm))
        else:
            bad = ~(torch.isfinite(loss) & torch.isfinite(torch.as_tensor(grad_norm)))
            torch.maximum(self._skip, bad.to(self._skip), out=self._skip)
        return grad_norm

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', but the step's numbers go through the meter instead of being waited for."""
        state = self.state
        if self.sharding is not None:
            grad_norm = self.sharding.grad_norm(grad_norm)
        if self.control.should_log and state.global_step > self._globalstep_last_logged:
            self._globalstep_last_logged = state.global_step
            rate = kwargs.get("learning_rate")
            values = {
                "loss": self._step_loss,
                "grad_norm": grad_norm,
                "learning_rate": self._get_learning_rate() if rate is None else rate,
            }
            self.meter.push(state.global_step, state.epoch, {**values, **self._parts})
            self._step_loss = 0.0
            self._parts.clear()
        self.control.should_log = False
        self._report(flush=self.control.should_training_stop or state.global_step >= state.max_steps)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _report(self, flush: bool) -> None:
        """Log the steps whose numbers have arrived, under their own step and epoch; refuse what is not finite."""
        state = self.state
        for reading in self.meter.pop(flush):
            self._refuse_nan(reading.step, **reading.values)
            now = state.global_step, state.epoch
            state.global_step, state.epoch = reading.step, reading.epoch
            try:
                self.log(dict(reading.values))
            finally:
                state.global_step, state.epoch = now

    def _refuse_nan(self, step: int, *, loss: float, grad_norm: float, **_: float) -> None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                stage = f"stages.{self.ctx.name}"
                kept = checkpoints.checkpoints(Path(self.args.output_dir))
                where = f"the checkpoint of step {checkpoints.step_of(kept[0])} is kept in {kept[0]}" if kept else ""
                raise StageError(
                    f"the {name} is {value} at step {step}; {where or 'no checkpoint had been written yet'}",
                    where=stage,
                    fix=f"a lower rate ({stage}.lr={self.args.learning_rate / 4:g}), a longer warm-up "
                    f"({stage}.warmup_ratio=0.1) or {stage}.precision=fp32",
                )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> int:
        return len(batch_samples)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.watchdog.beat(f"saving step {self.state.global_step}")
        # Before anything is written: a step that was not finite raises here, and the history is complete.
        self._report(flush=True)
        folder, step = Path(self.args.output_dir), self.state.global_step
        self.ctx.first_does(lambda: str(checkpoints.begin(folder, step)))
        try:
            super()._save_checkpoint(model, trial)
            if self.ctx.rank == 0:
                write_layout(checkpoints.checkpoint_path(folder, step), self.ctx)
            if self.ctx.rank == 0 and (state := self.stage_state()):
                write_json(checkpoints.checkpoint_path(folder, step) / STAGE_STATE, state)
        except BaseException:
            # On a full disk half a checkpoint would be in the way of everything, the next attempt included.
            shutil.rmtree(checkpoints.checkpoint_path(folder, step), ignore_errors=True)
            raise
        # Every rank writes the state of its random numbers: complete is what all have written.
        self.ctx.same("written")

        def complete() -> None:
            checkpoints.complete(checkpoints.checkpoint_path(folder, step))
            checkpoints.rotate(folder, self.config.keep_checkpoints)

        self.ctx.first_does(complete)
