"""torch's `fully_shard`: weights, gradients and moments in shards, gathered layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from posttrain.training.sharding.base import MOMENTS, Piece, Sharding, StepLoss
from posttrain.training.speed import decoder_layers


class Fsdp2(Sharding):
    """Each decoder layer is gathered for its forward and again for its backward pass; embeddings, last norm and head
    for the whole step. Gradients are summed over ranks after every micro-batch, so that none are kept whole."""

    def shard(self, outer: StepLoss, make_optimizer: Callable[[], torch.optim.Optimizer], **settings: Any) -> Any:
        mesh = mesh_of_all(self.ctx.device)
        for layer in decoder_layers(outer):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(outer, mesh=mesh, reshard_after_forward=False)
        for module in outer.modules():
            if isinstance(module, FSDPModule):
                # Sums: torch would average. gloo knows no scaled sum, so that the sum is asked for by name.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        # The first module that is used becomes the root; a roll-out could use a layer before the first step.
        outer._get_fsdp_state()._lazy_init()
        self.outer, self.optimizer = outer, make_optimizer()
        return self.optimizer

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        return self.optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float) -> Tensor:
        gradients = [parameter.grad for _, parameter in self.trained() if parameter.grad is not None]
        # One number a parameter and rank, squared and summed over ranks: the whole model's norm.
        local = [torch.linalg.vector_norm(gradient.to_local()) for gradient in gradients]
        squares = torch.stack(local).double().square().sum()
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([gradient.to_local() for gradient in gradients], scale)
        return norm

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        groups = [module for module in self.outer.modules() if isinstance(module, FSDPModule)]
        for module in groups:
            # Kept whole through forward passes inside; each would free its own layer.
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in groups:
                module.reshard()
                module.set_reshard_after_forward(module is not self.outer, recurse=False)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter

    def pieces(self) -> list[Piece]:
        found = []
        for name, parameter in self.trained():
            state = self.optimizer.state.get(parameter, {})
            moments = {key: state[key].to_local().flatten() for key in MOMENTS if key in state}
            value = parameter.detach().to_local().flatten()
            found.append(Piece(name, tuple(parameter.shape), self._start(parameter), value, moments))
        return found

    def _start(self, parameter: Tensor) -> int:
        """Rows are shared out as `torch.chunk` does: the last ranks have fewer, or none."""
        rows = parameter.shape[0]
        first = min(rows, self.ctx.rank * -(-rows // self.ctx.world_size))
        return first * (parameter.numel() // rows)

    def steps(self) -> int:
        state = next(iter(self.optimizer.state.values()), None)
        return 0 if state is None else int(state["step"])

    def make_moments(self, steps: int) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                counted = torch.tensor(float(steps), device=parameter.device)
                zeros = {key: torch.zeros_like(parameter) for key in MOMENTS}
                self.optimizer.state[parameter] = {"step": counted, **zeros}


def mesh_of_all(device: str) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device, (dist.get_world_size(),))


def shard_frozen(model: nn.Module, device: str) -> None:
    """Shard a frozen model that is called by its base model (`model.base_model(…)`), as a teacher is.

    The head is left whole: a loss multiplies by it outside of any forward pass.
    """
    base, mesh = model.base_model, mesh_of_all(device)
    for layer in decoder_layers(base):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(base, mesh=mesh, reshard_after_forward=True)
