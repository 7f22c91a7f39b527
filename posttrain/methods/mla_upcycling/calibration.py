"""Streamed calibration statistics: the second moment of every attention block's input, never an activation.

Keys, values and queries are linear in that input, so E[x xᵀ] and E[x] give every moment a plan needs. With QK-norm keys
are not: there the moment of [x ; normalised keys] is summed, and that of the normalised queries (see `source.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.methods.mla_upcycling.source import observe, observe_queries, observed_width


@dataclass(frozen=True)
class CalibrationStatistics:
    """Per layer: `second` E[x xᵀ] [D, D] and `mean` E[x] [D], float64; over `tokens` tokens.

    With QK-norm both are of [x ; normalised keys], width D + G·d_h, and `queries` holds per layer
    Σ over the heads of a group of E[q̂ q̂ᵀ] [G, d_h, d_h] of the normalised queries; empty without.
    """

    second: tuple[Tensor, ...]
    mean: tuple[Tensor, ...]
    tokens: int
    queries: tuple[Tensor, ...] = ()

    def of_layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`second`, `mean` and `queries` of one layer."""
        return self.second[index], self.mean[index], self.queries[index] if self.queries else None


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The `self_attn` of every decoder layer of a Llama-shaped model."""
    return [layer.self_attn for layer in model.model.layers]


def collect_statistics(
    model: nn.Module, batches: Iterable[Tensor], on_batch: Callable[[int], None] | None = None
) -> CalibrationStatistics:
    """Run token batches through the model and sum up each attention block's input.

    Args:
        model: a Llama-shaped causal LM; left in the mode it was in.
        batches: token ids [B, T], without padding.
        on_batch: called with the number of batches done; it may raise to stop.

    Raises:
        ValueError: no tokens, or values that are not finite.
    """
    device = next(model.parameters()).device
    blocks = attention_layers(model)
    widths = [observed_width(block, model.config.hidden_size) for block in blocks]
    # float64 sums: float32 would lose the small directions that decide where the spectrum is cut.
    second = [torch.zeros(width, width, dtype=torch.float64, device=device) for width in widths]
    total = [torch.zeros(width, dtype=torch.float64, device=device) for width in widths]
    queries: dict[int, Tensor] = {}
    tokens = 0
    with torch.no_grad(), _evaluating(model), _inputs_summed(blocks, second, total, queries):
        for done, batch in enumerate(batches, start=1):
            model.model(input_ids=batch.to(device), use_cache=False)
            tokens += batch.numel()
            if on_batch is not None:
                on_batch(done)
    return _normalised(second, total, queries, tokens)


def layer_statistics(
    layer: nn.Module, calls: Sequence[tuple[Tensor, Mapping[str, Any]]], hidden_size: int, tokens: int
) -> tuple[CalibrationStatistics, list[Tensor]]:
    """Statistics of one decoder layer alone, and what it makes of every input.

    Args:
        calls: hidden states [B, T, D] and the other arguments of each call.
        tokens: of all calls.

    Raises:
        ValueError: no tokens, or values that are not finite.
    """
    block = layer.self_attn
    width, device = observed_width(block, hidden_size), block.k_proj.weight.device
    second = [torch.zeros(width, width, dtype=torch.float64, device=device)]
    total = [torch.zeros(width, dtype=torch.float64, device=device)]
    queries: dict[int, Tensor] = {}
    outputs = []
    with torch.no_grad(), _inputs_summed([block], second, total, queries):
        for hidden, rest in calls:
            found = layer(hidden.to(device), **rest)
            outputs.append((found[0] if isinstance(found, tuple) else found).to(hidden.device))
    return _normalised(second, total, queries, tokens), outputs


def _normalised(
    second: Sequence[Tensor], total: Sequence[Tensor], queries: Mapping[int, Tensor], tokens: int
) -> CalibrationStatistics:
    if tokens == 0:
        raise ValueError("calibration needs at least one sequence of tokens")
    if not all(bool(torch.isfinite(matrix).all()) for matrix in second):
        raise ValueError("calibration met activations that are not finite: the source model or its dtype is broken")
    moments = tuple(matrix / tokens for matrix in second)
    means = tuple(vector / tokens for vector in total)
    return CalibrationStatistics(moments, means, tokens, tuple(queries[layer] / tokens for layer in sorted(queries)))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _inputs_summed(
    blocks: list[nn.Module], second: list[Tensor], total: list[Tensor], queries: dict[int, Tensor]
) -> Iterator[None]:
    def add(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].detach().flatten(0, -2).float()  # [tokens, D]
            flat, met = observe(blocks[index], inputs), observe_queries(blocks[index], inputs)
            if met is not None:
                queries[index] = queries.get(index, 0) + met.double()
            second[index] += (flat.T @ flat).double()
            total[index] += flat.sum(0, dtype=torch.float64)

        return hook

    # The key projection, not the block, is hooked: its input is positional in every family.
    handles = [block.k_proj.register_forward_pre_hook(add(index)) for index, block in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
