"""Layer-aligned distillation on transformers' Trainer: within a step, one layer after the other is trained alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from posttrain.methods.layer_distillation.config import IldConfig
from posttrain.methods.layer_distillation.loss import layer_loss
from posttrain.models.blocks import block_calls, block_outputs
from posttrain.pipeline.context import StageContext
from posttrain.training import speed
from posttrain.training.blocks import OrderedBlocks, collate
from posttrain.training.distributed import add_numbers
from posttrain.training.trainer import StageTrainer

TEACHER_SHARE = 3
"""A trained layer costs about as much as this many layers of the teacher beside the teacher's own."""


class LayerTrainer(StageTrainer):
    """Trains every layer of `student` to do to the teacher's hidden states what the teacher's layer does.

    Legend: L layers. A step runs the teacher once, a layer at a time over all micro-batches; where it stands, the
    student's layer is trained, stepped, and its gradients are freed. Between layers only hidden states live. With
    several ranks each trains a stretch of layers and runs the teacher as far as that; nothing is exchanged but numbers
    for the log, and weights before they are saved.
    """

    config: IldConfig

    def __init__(
        self, ctx: StageContext, config: IldConfig, student: PreTrainedModel, teacher: PreTrainedModel, blocks: Tensor
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        layers = student.config.num_hidden_layers
        self.shares = layer_shares(layers, ctx.world_size)
        self.trained_of = select_by_layer(student, config.trainable)
        self.outputs = block_outputs
        self.norm = torch.zeros(())
        self.gradient_bytes = 0
        """Most bytes of gradients that existed at a time, on this rank."""
        sequences = OrderedBlocks(blocks, config.max_steps * config.sequences_per_step, ctx.seed)
        super().__init__(
            # Layers are shared out here, so that no other strategy has anything to share.
            replace(ctx, strategy="ddp" if ctx.world_size > 1 else "single"),
            config,
            student,
            sequences,
            collate,
            tokens_per_step=config.tokens_per_step,
            frozen=(teacher,),
            whole_rows=True,
            whole_steps=True,
        )
        teacher.to(self.args.device)

    @property
    def owned(self) -> range:
        """The layers that this rank trains."""
        return self.shares[self.ctx.rank]

    @property
    def captures(self) -> bool:
        return False

    @contextlib.contextmanager
    def fast(self) -> Iterator[None]:
        """As for every stage, but what is compiled is a layer in two parts."""
        compiled = self.compiles
        with contextlib.ExitStack() as stack:
            stack.enter_context(speed.attention_backends(self.config.attention, self.args.device.type))
            for model in (self.model, self.teacher):
                stack.enter_context(speed.causal_without_masks(model))
                if self.config.residual_dtype == "bfloat16":
                    stack.enter_context(speed.bf16_residual_stream(model))
            if compiled:
                stack.enter_context(speed.compiler_settings())
                self.outputs = torch.compile(block_outputs, dynamic=False)
            try:
                yield
            finally:
                self.outputs = block_outputs

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All sequences of a step, on every rank."""
        if self.ctx.world_size == 1:
            return super().get_train_dataloader()
        batch = self.config.sequences_per_step
        return DataLoader(self.train_dataset, batch_size=batch, collate_fn=collate)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.watchdog.beat(f"step {self.state.global_step + 1}")
        # No dropout on either side: layers are compared.
        model.eval()
        losses, norms = self.train_layers(self._prepare_inputs(inputs)["input_ids"])
        values = {"loss": losses.sum(), "norm": norms.square().sum()}
        values |= {f"layer_{layer:02d}": loss for layer, loss in enumerate(losses)}
        if self.ctx.world_size > 1:
            values = add_numbers(values, self.args.device)
        self._step_loss, self.norm = values.pop("loss"), values.pop("norm").sqrt()
        self.record_parts(**values)
        return self._step_loss

    def train_layers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """One optimiser step of this rank's layers on ids [B, T]; losses and gradient norms [L], 0 for other layers."""
        batches = ids.split(self.config.micro_batch(1))
        with torch.no_grad(), self.compute_loss_context_manager():
            calls = [block_calls(self.teacher, batch) for batch in batches]
            ours = [block_calls(self.model, batch).arguments for batch in batches]
        hidden = [call.hidden for call in calls]
        losses, norms = torch.zeros(2, len(ours[0]), device=ids.device)
        for layer in range(self.owned.stop if self.owned else 0):
            for index, call in enumerate(calls):
                with self.compute_loss_context_manager():
                    with torch.no_grad():
                        theirs = self.outputs(self.teacher.model.layers[layer], hidden[index], **call.arguments[layer])
                    if layer in self.owned:
                        block = self.model.model.layers[layer]
                        found = self.outputs(block, hidden[index], **ours[index][layer])
                        loss = self.loss_of(layer, found, theirs) / ids.numel()
                if layer in self.owned:
                    loss.backward()
                    losses[layer] += loss.detach()
                hidden[index] = theirs[1]
            if layer in self.owned:
                norms[layer] = self._update(layer, losses[layer])
        return losses, norms

    def loss_of(self, layer: int, found: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Tensor:
        """Sum over tokens; the last layer's outputs are compared behind the final norms."""
        if layer == len(self.model.model.layers) - 1:
            found = (found[0], self.model.model.norm(found[1]))
            theirs = (theirs[0], self.teacher.model.norm(theirs[1]))
        return layer_loss(found, theirs, self.config.loss)

    def _update(self, layer: int, loss: Tensor) -> Tensor:
        """Clip this layer's gradients, step, free them; the norm. Nothing is changed where a number is not finite."""
        parameters = self.trained_of[layer]
        if self.watch.steps == 0:
            gradients = (parameter.grad for parameter in self.model.parameters())
            held = sum(gradient.nbytes for gradient in gradients if gradient is not None)
            self.gradient_bytes = max(self.gradient_bytes, held)
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm or float("inf"))
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        torch.maximum(self._skip, bad.to(self._skip), out=self._skip)
        # Only this layer's parameters have gradients, and an optimiser passes over those that have none.
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Of all layers together, each before its clipping."""
        return self.norm

    # ----- several ranks

    def share_weights(self, moments: bool) -> None:
        """Give every rank the layers that others have trained, with the optimiser's moments if asked for."""
        if self.ctx.world_size == 1:
            return
        state = self.optimizer.optimizer.state
        for rank, share in enumerate(self.shares):
            for parameter in (parameter for layer in share for parameter in self.trained_of[layer]):
                dist.broadcast(parameter.data, rank)
                if moments:
                    own = state[parameter]
                    for name in ("exp_avg", "exp_avg_sq"):
                        dist.broadcast(own.setdefault(name, torch.zeros_like(parameter)), rank)
                    dist.broadcast(own.setdefault("step", torch.zeros((), device=parameter.device)), rank)

    def forget_moments(self) -> None:
        """Of layers that others train."""
        for layer in range(len(self.trained_of)):
            for parameter in self.trained_of[layer] if layer not in self.owned else ():
                self.optimizer.optimizer.state.pop(parameter, None)

    def finish(self) -> None:
        """Every rank has all trained layers; moments are freed, since writing a model copies its weights."""
        self.share_weights(moments=False)
        self.optimizer.optimizer.state.clear()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.share_weights(moments=True)
        super()._save_checkpoint(model, trial)
        self.forget_moments()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.forget_moments()


def select_by_layer(model: nn.Module, trainable: str) -> list[list[nn.Parameter]]:
    """Freeze all but what is trained; the trained parameters of every layer. See `IldConfig.trainable`."""
    model.requires_grad_(False)
    found = [list((layer.self_attn if trainable == "mixer" else layer).parameters()) for layer in model.model.layers]
    if trainable == "all":
        found[-1] += list(model.model.norm.parameters())
    for parameter in (parameter for parameters in found for parameter in parameters):
        parameter.requires_grad_(True)
    return found


def layer_shares(layers: int, ranks: int) -> list[range]:
    """A stretch of layers for each rank such that the one with the most work has the least it can have.

    A rank runs the teacher as far as its last layer and trains its own, which costs `TEACHER_SHARE` times as much.
    """

    def stretches(limit: int) -> list[range]:
        found, start = [], 0
        for _ in range(ranks):
            # stop + TEACHER_SHARE · (stop - start) <= limit
            stop = max(start, min(layers, (limit + TEACHER_SHARE * start) // (1 + TEACHER_SHARE)))
            found.append(range(start, stop))
            start = stop
        return found

    limits = range(1, (1 + TEACHER_SHARE) * layers + 1)
    return next(found for found in map(stretches, limits) if found[-1].stop == layers)
