"""transformers' `Trainer` with a model that ranks may hold in shards; `StageTrainer` builds on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import Trainer

from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.training.sharding.base import Sharding, StepLoss
from posttrain.training.sharding.shards import Shards, read_moments, read_weights, write_shard

WEIGHTS, SCHEDULER = "model.safetensors", "scheduler.pt"


class ShardedTrainer(Trainer):
    """Where `sharding` is None this is `Trainer`; else the strategy shards, sums gradients, clips, steps and saves.

    `self.model` stays the model that losses, TRL and roll-outs know: it is sharded in place, within a module whose
    forward pass is `compute_loss`. Outside of that pass its weights are read under `whole_weights`. When training has
    ended, `take_whole` puts an ordinary model in its place.
    """

    ctx: StageContext
    sharding: Sharding | None

    # ----- training

    @contextlib.contextmanager
    def in_shards(self) -> Iterator[None]:
        """Inside, the loop's losses and gradients are those of the strategy."""
        if self.sharding is None:
            yield
            return
        if self.sharding.outer is not None:
            raise StageError("a sharded model is trained once by a trainer", fix="make a new trainer")
        sharding, accelerator = self.sharding, self.accelerator

        def loss(model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
            # `compute` below does the autocast: DeepSpeed switches off any that is around it.
            with torch.autocast(self.args.device.type, enabled=False):
                return sharding.loss(inputs, **kwargs)

        before = accelerator.backward
        # In front of the methods, so that the loops of transformers and TRL need not be written anew.
        self.compute_loss = loss
        accelerator.backward = lambda value, **kwargs: sharding.backward(value)
        try:
            yield
        finally:
            del self.compute_loss
            accelerator.backward = before

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.sharding is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

        def compute(inputs: dict[str, Any], **kwargs: Any) -> Any:
            with self.compute_loss_context_manager():
                return type(self).compute_loss(self, self.model, inputs, **kwargs)

        self.optimizer = self.sharding.shard(
            StepLoss(self.model, compute),
            self.create_optimizer,
            max_grad_norm=self.args.max_grad_norm,
            micro_batch=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
        )
        self.create_scheduler(num_training_steps=max_steps, optimizer=self.sharding.scheduled)
        if resume_from_checkpoint is not None:
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        return self.model, train_dataloader

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharding is None:
            return super()._clip_grad_norm(model)
        return self.sharding.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.sharding is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.sharding.clip(0.0) if self.args.max_grad_norm == 0 else grad_norm

    # ----- weights outside of the loss

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model's weights can be read and the model be called without gradients. Ranks enter together."""
        if self.sharding is None or self.sharding.outer is None:
            return contextlib.nullcontext()
        return self.sharding.whole_weights()

    def take_whole(self) -> None:
        """Put an ordinary model on the CPU in the place of the sharded one; with weights on the first rank alone."""
        if self.sharding is not None:
            self.optimizer = self.callback_handler.optimizer = None
            self.model = self.model_wrapped = self.callback_handler.model = self.sharding.whole_model()

    # ----- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The parameters under their own names: `save_pretrained` may rename them, and loading would not notice.

        In shards every rank writes weights together with the moments.
        """
        if self.sharding is None:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(folder / WEIGHTS), metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        write_shard(
            Path(output_dir),
            self.sharding.pieces(),
            rank=self.ctx.rank,
            world_size=self.ctx.world_size,
            strategy=self.sharding.name,
            steps=self.sharding.steps(),
        )
        if self.ctx.rank == 0:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As `_save` wrote them; a missing or unexpected name is an error, where transformers would only warn.

        Called before the model is sharded.
        """
        if self.sharding is None:
            load_model(model if model is not None else self.model, Path(resume_from_checkpoint) / WEIGHTS, strict=True)
            return
        trained = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        read_weights(Path(resume_from_checkpoint), trained)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharding is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.sharding.make_moments(Shards(Path(checkpoint)).steps)
        read_moments(Path(checkpoint), self.sharding.pieces())
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))
        # The state of an optimiser as torch saves it would hold its rates; the scheduler sets the next one only.
        for group, rate in zip(self.sharding.scheduled.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
