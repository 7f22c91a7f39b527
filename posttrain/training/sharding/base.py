"""What a sharding strategy does for a trainer, and what the strategies share."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.pipeline.context import StageContext

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for every element of a trained parameter."""


@dataclass(frozen=True)
class Piece:
    """What this rank owns of a trained parameter: elements `start` to `start + value.numel()` of it, flattened.

    Attributes:
        shape: of the whole parameter.
        value: 1-D; moments: by the names of `MOMENTS`, 1-D, empty before the first optimiser step. All are views of
            what the optimiser works on: what is copied into them takes effect.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    value: Tensor
    moments: dict[str, Tensor]


class StepLoss(nn.Module):
    """The module that is sharded: its forward pass is a whole micro-batch's loss, not only the model's own pass.

    Losses call the base model and multiply by the head's weight themselves. Inside this forward all that they touch is
    at hand, whatever they touch.
    """

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._compute = compute

    def forward(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        return self._compute(inputs, **kwargs)


class Sharding:
    """A model held in shards by the ranks of the default process group, with fp32 weights and an AdamW over them.

    The loss of a rank is its share of the whole step's: gradients are summed over ranks.
    """

    compiles = True
    """Whether decoder layers can be compiled."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.name = ctx, ctx.strategy
        self.outer: StepLoss | None = None
        self._empty: nn.Module | None = None

    # ----- life of a training

    def remember(self, model: nn.Module) -> None:
        """Keep what the model is but for its weights: `whole_model` fills it. Before anything is changed about it."""
        self._empty = copy.deepcopy(
            model, {id(parameter): _without_storage(parameter) for parameter in model.parameters()}
        )

    def shard(self, outer: StepLoss, make_optimizer: Callable[[], torch.optim.Optimizer], **settings: Any) -> Any:
        """Shard the parameters of `outer` in place and return the optimiser, which has a `step` and `param_groups`.

        Args:
            settings: `max_grad_norm`, `micro_batch` and `accumulation` of the training.
        """
        raise NotImplementedError

    @property
    def scheduled(self) -> torch.optim.Optimizer:
        """The optimiser whose groups hold the learning rates."""
        raise NotImplementedError

    def loss(self, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """A micro-batch's loss."""
        assert self.outer is not None
        return self.outer(inputs, **kwargs)

    def before_micro_batch(self, last: bool) -> None:
        """`last`: of an optimiser step."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients."""
        raise NotImplementedError

    def clip(self, max_norm: float) -> Tensor | float | None:
        """Clip the gradients and return their norm over all parameters and ranks; None: `step` does both."""
        raise NotImplementedError

    def grad_norm(self, clipped: Any) -> Any:
        """The norm of the step just taken, from what `clip` returned."""
        return clipped

    # ----- weights

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, parameters are whole on every rank, to be read outside the forward pass. Ranks enter together."""
        raise NotImplementedError

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter, on every rank; all ranks ask together."""
        raise NotImplementedError

    def whole_model(self) -> nn.Module:
        """An ordinary model on the CPU: with weights on the first rank, without elsewhere. All ranks ask together."""
        assert self._empty is not None and self.outer is not None
        found: dict[int, nn.Parameter] = {}
        pairs = zip(self._empty.named_parameters(), self.outer.model.named_parameters(), strict=True)
        for (name, empty), (sharded_name, parameter) in pairs:
            assert name == sharded_name
            tensor = self.whole(parameter).detach()
            if self.ctx.rank == 0:
                # A copy, not a view of what goes on being trained.
                tensor = tensor.to("cpu", copy=True).view(empty.shape).contiguous()
                found[id(empty)] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
        for module in self._empty.modules() if found else ():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    # By identity, so that tied parameters stay one.
                    module._parameters[name] = found[id(parameter)]
        return self._empty.cpu() if found else self._empty

    # ----- checkpoints

    def pieces(self) -> list[Piece]:
        """What this rank owns of every trained parameter, in the order of the model."""
        raise NotImplementedError

    def steps(self) -> int:
        """Optimiser steps that the moments have seen."""
        raise NotImplementedError

    def make_moments(self, steps: int) -> None:
        """Give every piece zero moments that have seen so many steps, to be filled from a checkpoint."""
        raise NotImplementedError

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Name, as the model alone has it, and parameter of all that is trained."""
        assert self.outer is not None
        return [(name, one) for name, one in self.outer.model.named_parameters() if one.requires_grad]


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
