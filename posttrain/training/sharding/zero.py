"""DeepSpeed's ZeRO 2 and 3 around our own loss, AdamW, precision and checkpoints."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.config.deepspeed import deepspeed_config
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.training.sharding.base import MOMENTS, Piece, Sharding, StepLoss
from posttrain.training.speed import decoder_layers


class Zero(Sharding):
    """zero2: gradients and moments in shards, weights whole on every rank. zero3: weights in shards too, gathered
    layer by layer. Gradients are summed over ranks after every micro-batch, which is how ZeRO saves their memory."""

    def __init__(self, ctx: StageContext) -> None:
        super().__init__(ctx)
        self.stage = {"zero2": 2, "zero3": 3}[ctx.strategy]
        # A compiled layer would hold on to weights that ZeRO 3 takes away between passes.
        self.compiles = self.stage == 2
        self.deepspeed = import_deepspeed(ctx.device)

    def shard(self, outer: StepLoss, make_optimizer: Callable[[], torch.optim.Optimizer], **settings: Any) -> Any:
        self.outer, self.adamw = outer, make_optimizer()
        config = deepspeed_config(self.stage, self.ctx.world_size, overrides=self.ctx.deepspeed, **settings)
        if self.stage == 3:
            self._gather_by_layer(outer)
        self.engine, self.zero, *_ = self.deepspeed.initialize(
            model=outer, optimizer=self.adamw, config=config, dist_init_required=False
        )
        self.engine.train()
        # ZeRO 3, and an older DeepSpeed, know averages over ranks only. Undone exactly for powers of two ranks, else to
        # a rounding.
        averages = self.stage == 3 or getattr(self.zero, "gradient_average", True)
        self._factor = self.ctx.world_size if averages else 1
        return Stepper(self.engine, self.adamw)

    def _gather_by_layer(self, outer: StepLoss) -> None:
        """Whole layers at a time, as mixers may read their projections' weights without calling them; and what is
        outside of layers (embeddings, last norm, head) for the whole of a step's forward and backward pass."""
        layers = decoder_layers(outer)
        self.deepspeed.utils.set_z3_leaf_modules(outer, list({type(layer) for layer in layers}))
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        for parameter in outer.parameters():
            if id(parameter) not in inside:
                self.deepspeed.zero.register_external_parameter(outer, parameter)
        # With frozen embeddings the first layer's inputs would have no gradient, by which ZeRO tells its end.
        outer.model.get_input_embeddings().register_forward_hook(_with_gradient)

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        return self.adamw

    def loss(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        return self.engine(inputs, **kwargs)

    def before_micro_batch(self, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self._factor, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> None:
        """The engine clips within `step`, as `max_grad_norm` of its configuration says."""

    def grad_norm(self, clipped: Any) -> Any:
        return self.engine.get_global_grad_norm()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        if self.stage == 2:
            yield
            return
        # Without its hooks, which would take each module's weights away when the module has been called.
        offload, parameters = self.zero.parameter_offload, list(self.outer.parameters())
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            with self.deepspeed.zero.GatheredParameters(parameters):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        if self.stage == 2:
            return parameter
        with self.deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def pieces(self) -> list[Piece]:
        return [piece for piece in (self._piece(*one) for one in self.trained()) if piece is not None]

    def _piece(self, name: str, parameter: nn.Parameter) -> Piece | None:
        if self.stage == 3:
            flat, offset, _ = self._place(parameter)
            shape, each = tuple(parameter.ds_shape), parameter.ds_tensor.numel()
            start = min(self.ctx.rank * each, parameter.ds_numel)
            count = min(each, parameter.ds_numel - start)
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank has all of it
                return None
            flat = self._partition_of(parameter)
            shape, start = tuple(parameter.shape), mapping.lp_fragment_address.start
            offset, count = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        state = self.adamw.state.get(flat, {})
        moments = {key: state[key].narrow(0, offset, count) for key in MOMENTS if key in state}
        return Piece(name, shape, start, flat.detach().narrow(0, offset, count), moments)

    def _place(self, parameter: nn.Parameter) -> tuple[Tensor, int, int]:
        """Flat fp32 partition, offset in it, and length with padding, of a parameter in ZeRO 3."""
        group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
        return self.zero.fp32_partitioned_groups_flat[group], offset, length

    def _partition_of(self, parameter: nn.Parameter) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[parameter._hp_mapping.param_group_index]

    def _flat(self) -> list[Tensor]:
        """The fp32 partitions that AdamW works on."""
        return self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups

    def steps(self) -> int:
        state = next((self.adamw.state[flat] for flat in self._flat() if flat in self.adamw.state), {})
        return int(state.get("step", 0))

    def make_moments(self, steps: int) -> None:
        for flat in self._flat():
            counted = torch.tensor(float(steps), device=flat.device)
            self.adamw.state[flat] = {"step": counted, **{key: torch.zeros_like(flat) for key in MOMENTS}}


def _with_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)


class Stepper:
    """What transformers' loop takes for its optimiser."""

    def __init__(self, engine: Any, adamw: torch.optim.Optimizer) -> None:
        self.engine, self.adamw = engine, adamw

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.adamw.param_groups

    def step(self) -> None:
        self.engine.step()


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, ready for this device.

    Raises:
        StageError: it is not installed.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        what = f"engines zero2 and zero3 need DeepSpeed, which cannot be imported: {error}"
        raise StageError(what, "engine", "pip install deepspeed, or engine=fsdp2") from error
    deepspeed.utils.logger.setLevel("WARNING")
    # It calls collectives by names that torch 2.13 tells of at every call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if device == "cpu":
        # Else a C++ extension is compiled at the start; gloo does what it does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
