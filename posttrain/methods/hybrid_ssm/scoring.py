"""How much a hybrid gains from each attention layer: held-out KL to the teacher, one layer swapped at a time.

Legend: B rows, T tokens, D hidden width, L layers. Swapping layer i leaves the layers before it alone: what they give
is computed once for all swaps, so that a set of L scores costs L²/2 layers instead of L².
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from posttrain_kernels.linear_kl import linear_kl
from torch import Tensor, nn

from posttrain.models.blocks import block_calls

Sums = tuple[int, list[float]]
"""Batches done, and over their tokens the summed divergences with each layer added [L] and without [1]."""
Done = Callable[[int, list[float]], None]
"""Called with the `Sums` after every batch; it may raise to stop."""


class SwapScorer:
    """Divergences of hybrids whose layers come from two models, over batches of text, from a teacher that ran once.

    Args:
        state, attention: conversions of one source, as for `assemble`; teacher: what they should predict like.
        batches: token ids [B, T] without padding.
        autocast: compute in bf16.
    """

    def __init__(
        self, state: nn.Module, attention: nn.Module, teacher: nn.Module, batches: Sequence[Tensor], autocast: bool
    ) -> None:
        self.models = {"state": state, "attention": attention}
        self.teacher, self.batches, self.autocast = teacher, batches, autocast
        self.layers = state.config.num_hidden_layers
        self.tokens = sum(batch.numel() for batch in batches)
        self._taught: dict[int, Tensor] = {}

    @torch.no_grad()
    def scores(
        self, kept: Sequence[int] = (), on_batch: Done | None = None, since: Sums | None = None
    ) -> tuple[float, list[float]]:
        """Divergence with the layers `kept` as attention, and by how much each further one lowers it.

        `since`: go on from what `on_batch` was told. The result is the same bits.

        Returns:
            KL(teacher ‖ hybrid), nats a token, and L scores s_i = KL − KL with layer i too, 0 for layers kept already.
        """
        first, sums = since or (0, [0.0] * (self.layers + 1))
        for index in range(first, len(self.batches)):
            found = self._batch(index, set(kept)).tolist()
            sums = [before + more for before, more in zip(sums, found, strict=True)]
            if on_batch is not None:
                on_batch(index + 1, sums)
        means = [value / self.tokens for value in sums]
        return means[-1], [0.0 if layer in kept else means[-1] - means[layer] for layer in range(self.layers)]

    @torch.no_grad()
    def divergence(self, kept: Sequence[int]) -> float:
        """KL(teacher ‖ hybrid) with these layers as attention, nats a token."""
        kept = set(kept)
        total = sum(float(self._from(0, *self._start(index), kept, index)) for index in range(len(self.batches)))
        return total / self.tokens

    def _batch(self, index: int, kept: set[int]) -> Tensor:
        """Sums over a batch's tokens of the divergences with each layer added [L], and without [1], fp64."""
        hidden, calls = self._start(index)
        found = torch.zeros(self.layers + 1, dtype=torch.float64)
        for layer in range(self.layers):
            if layer not in kept:
                found[layer] = self._from(layer, hidden, calls, kept | {layer}, index)
            hidden = self._layer(layer, hidden, calls, kept)
        found[-1] = self._divergence(hidden, kept, index)
        return found

    def _start(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        ids = self.batches[index].to(self.teacher.device)
        with self._context():
            calls = {name: block_calls(model, ids) for name, model in self.models.items()}
        return calls["state"].hidden, {name: call.arguments for name, call in calls.items()}

    def _from(self, layer: int, hidden: Tensor, calls: dict[str, Any], kept: set[int], index: int) -> Tensor:
        """Divergence of a batch whose hidden states before `layer` are given, summed over its tokens."""
        for following in range(layer, self.layers):
            hidden = self._layer(following, hidden, calls, kept)
        return self._divergence(hidden, kept, index)

    def _layer(self, layer: int, hidden: Tensor, calls: dict[str, Any], kept: set[int]) -> Tensor:
        name = "attention" if layer in kept else "state"
        with self._context():
            found = self.models[name].model.layers[layer](hidden, **calls[name][layer])
        return found[0] if isinstance(found, tuple) else found

    def _divergence(self, hidden: Tensor, kept: set[int], index: int) -> Tensor:
        last = self.models["attention" if self.layers - 1 in kept else "state"]
        with self._context():
            hidden = last.model.norm(hidden).flatten(0, 1)
            heads = [model.get_output_embeddings().weight for model in (self.models["state"], self.teacher)]
            found = linear_kl(hidden, heads[0], self._teacher(index), heads[1]).divergence
        return found.double().sum().cpu()

    def _teacher(self, index: int) -> Tensor:
        """The teacher's last hidden states [B·T, D], computed once and kept on the host."""
        if index not in self._taught:
            ids = self.batches[index].to(self.teacher.device)
            hidden = self.teacher.model(input_ids=ids, use_cache=False).last_hidden_state
            self._taught[index] = hidden.flatten(0, 1).cpu()
        return self._taught[index].to(self.teacher.device)

    def _context(self) -> contextlib.AbstractContextManager[Any]:
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.teacher.device.type, dtype=torch.bfloat16)
