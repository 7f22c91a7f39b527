"""A micro-step (forward, loss, backward) as one CUDA graph, for models whose kernels take less time than a launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

EAGER_CALLS = 2
"""Calls before the capture: they compile what is compiled, choose cuBLAS and cuDNN plans, and are ordinary training."""

Compute = Callable[[dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]


class GraphedMicroStep:
    """Calls `compute`, runs its loss backward, and after a few calls replays both from a captured CUDA graph.

    `compute` maps inputs to the loss and further scalars; it must not wait for the device, and draw no random numbers.
    With `accumulates`, gradients are added to those the parameters hold; a parameter that takes part and has none gets
    zeroed memory that stays its own, so `zero_grad(set_to_none=True)` between optimiser steps is fine. Without, every
    call writes gradients anew, in memory that activations leave on the way: the parameters must hold none. Inputs of
    other shapes than the captured ones run without the graph. Everything runs on one side stream that the current
    stream waits for; at the capture no loss of the parameters computed elsewhere may still be held (its gradient nodes
    belong to another stream, which CUDA refuses).
    """

    def __init__(self, compute: Compute, parameters: Iterable[nn.Parameter], accumulates: bool = True) -> None:
        self.compute, self.accumulates = compute, accumulates
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.stream = torch.cuda.Stream()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: tuple[Tensor, dict[str, Tensor]] | None = None
        self._used: list[nn.Parameter] = []
        """Parameters that got a gradient before the capture: AdamW leaves others alone, were they not given zeros."""
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the scalars of one micro-batch, detached; valid until the caller changes them."""
        self.calls += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        if self.graph is None and self.calls > EAGER_CALLS:
            self._capture(inputs)
        if self.graph is not None and _shapes(inputs) == _shapes(self._inputs):
            loss, parts = self._replay(inputs)
        else:
            with torch.cuda.stream(self.stream):
                loss, parts = self._micro_step(inputs)
            self._used = [parameter for parameter in self.parameters if parameter.grad is not None]
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss.clone(), {name: value.clone() for name, value in parts.items()}

    def _micro_step(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = self.compute(inputs)
        loss.backward()
        return loss.detach(), {name: value.detach() for name, value in parts.items()}

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        """Record the micro-step on copies of the inputs and on gradient memory of its own; nothing is computed."""
        with torch.cuda.stream(self.stream):
            self._inputs = {name: value.clone() for name, value in inputs.items()}
            if self.accumulates:
                self._gradients = [(parameter, torch.zeros_like(parameter)) for parameter in self._used]
            self._attach()
        # The graph takes memory of its own: what the calls before it left cached would be held twice.
        torch.cuda.empty_cache()
        graph = _new_graph(self)
        # Other threads, such as the one that pins batches, may call the driver meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._outputs = self._micro_step(self._inputs)
        if not self.accumulates:
            self._gradients = [(parameter, parameter.grad) for parameter in self._used]
            for parameter in self._used:
                parameter.grad = None
        self.graph = graph

    def _replay(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.cuda.stream(self.stream):
            self._attach()
            for name, value in inputs.items():
                self._inputs[name].copy_(value, non_blocking=True)
            self.graph.replay()
        return self._outputs

    def _attach(self) -> None:
        """Make the parameters' gradients lie where the graph puts them, with the values they have (none is zero)."""
        if not self.accumulates:
            if any(parameter.grad is not None for parameter in self._used):
                raise RuntimeError("gradients from before a micro-step that does not accumulate would be lost")
            for parameter, memory in self._gradients:
                parameter.grad = memory
            return
        empty = [memory for parameter, memory in self._gradients if parameter.grad is None]
        if empty:
            torch._foreach_zero_(empty)
        for parameter, memory in self._gradients:
            if parameter.grad is not None and parameter.grad is not memory:
                memory.copy_(parameter.grad)
            parameter.grad = memory


def _shapes(inputs: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in inputs.items()}


def _new_graph(step: GraphedMicroStep) -> Any:
    """The graph to capture into; tests put another in its place, which needs the step."""
    return torch.cuda.CUDAGraph()
