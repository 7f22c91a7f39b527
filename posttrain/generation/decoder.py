"""Prompt and step of a whole model on packed weights and static caches."""

from __future__ import annotations

import torch
from posttrain_kernels.rms_norm import rms_norm
from posttrain_kernels.swiglu import silu_mul
from torch.nn import functional as F

from posttrain.generation.layers import Moment, Prompt
from posttrain.generation.mixers import MIXERS
from posttrain.generation.weights import DecoderWeights


class Decoder:
    """A model that decodes `rows` sequences of at most `slots` tokens side by side.

    Attributes:
        caches: one a layer, allocated here and never again.
    """

    def __init__(self, weights: DecoderWeights, rows: int, slots: int) -> None:
        self.weights, self.rows, self.slots = weights, rows, slots
        self.eps = weights.arch["rms_norm_eps"]
        self.mixers = [
            MIXERS[kind](weights.arch, index, weights.layers[index], weights.rotary[index])
            for index, kind in enumerate(weights.kinds)
        ]
        self.caches = [mixer.allocate(rows, slots, dtype=weights.dtype, device=weights.device) for mixer in self.mixers]

    def prefill(self, ids: torch.Tensor, start: torch.Tensor, row: int, end: int, padded: bool) -> torch.Tensor:
        """Read prompts into the caches; logits [b, V] after their last token.

        Args:
            ids: [b, T] left-padded token ids, which go to rows `row` … and to the T slots before `end`.
            start: [b] int64, first slot of each row's own tokens.
            padded: whether some row starts after the first of these slots (known to the caller, so nothing is read).
        """
        rows, length = ids.shape
        slots = torch.arange(end - length, end, device=ids.device)
        prompt = Prompt(
            slice(row, row + rows),
            slice(end - length, end),
            (slots - start[:, None]).clamp_min(0),
            _causal_mask(slots, start) if padded else None,
            slots >= start[:, None] if padded else None,
        )
        hidden, residual = F.embedding(ids, self.weights.embeddings), None
        for mixer, layer, cache in zip(self.mixers, self.weights.layers, self.caches, strict=True):
            hidden, residual = rms_norm(hidden, layer["input_norm"], self.eps, residual)
            hidden = mixer.prefill(hidden, prompt, cache)
            hidden, residual = rms_norm(hidden, layer["post_norm"], self.eps, residual)
            hidden = _mlp(hidden, layer)
        return self._logits(hidden[:, -1], residual[:, -1])

    def step(self, tokens: torch.Tensor, slot: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token a row; the caches' first B rows are written at `slot`.

        Reads nothing on the host, so that it can be captured in a CUDA graph.

        Args:
            tokens: [B] int64; slot: [1] int64 on the device; start: [B] int64, first slot of each row.
        """
        now = Moment(slot, slot + 1, start, slot - start)
        hidden, residual = F.embedding(tokens, self.weights.embeddings), None
        for mixer, layer, cache in zip(self.mixers, self.weights.layers, self.caches, strict=True):
            hidden, residual = rms_norm(hidden, layer["input_norm"], self.eps, residual)
            hidden = mixer.step(hidden, now, cache)
            hidden, residual = rms_norm(hidden, layer["post_norm"], self.eps, residual)
            hidden = _mlp(hidden, layer)
        return self._logits(hidden, residual)

    def keep_rows(self, order: torch.Tensor) -> None:
        """Row `order[i]` of every cache becomes row i."""
        for cache in self.caches:
            cache.keep_rows(order)

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of what a step changes for good and a rehearsal must give back."""
        return [tensor.clone() for cache in self.caches for tensor in cache.moving]

    def restore(self, snapshot: list[torch.Tensor]) -> None:
        moving = (tensor for cache in self.caches for tensor in cache.moving)
        for tensor, saved in zip(moving, snapshot, strict=True):
            tensor.copy_(saved)

    def cache_bytes(self) -> int:
        return sum(cache.bytes() for cache in self.caches)

    def _logits(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.linear(rms_norm(hidden, self.weights.norm, self.eps, residual)[0], self.weights.head)


def _mlp(x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
    inner = silu_mul(F.linear(x, layer["gate_up"], layer.get("gate_up_bias")))
    return F.linear(inner, layer["down"], layer.get("down_bias"))


def _causal_mask(slots: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Boolean [b, 1, T, T]: true where the query's slot may look at the key's.

    A padding token looks at itself: a row without any key would be NaN, and NaN times a weight of zero stays NaN.
    """
    query, key = slots[:, None], slots[None, :]
    own = key >= start[:, None, None]  # [b, 1, T]
    return ((key <= query) & (own | (key == query)))[:, None]
