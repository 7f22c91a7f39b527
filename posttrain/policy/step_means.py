"""Means over all tokens of an optimiser step, whatever micro-batches and ranks they were computed in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepMeans:
    """Adds up a step's micro-batches. A mean of their means would weigh a token by how many stand beside it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor, largest: bool = False) -> None:
        """Take in a micro-batch's values where `mask` is, both `[B, T]`; with `largest`, NAME_max is kept too."""
        found = values.detach()[mask].double()
        sums = torch.stack([found.sum(), mask.sum().double()])
        self._sums[name] = sums + self._sums[name] if name in self._sums else sums
        if largest:
            peak = found.max() if len(found) else found.sum()
            self._largest[name] = torch.maximum(peak, self._largest[name]) if name in self._largest else peak

    def take(self, accelerator: Any = None) -> dict[str, float]:
        """The step's figures, after which the next step begins.

        Args:
            accelerator: with several ranks, all of which must have added the same names and take them together.
        """
        found: dict[str, float] = {}
        for name, sums in self._sums.items():
            total = sums if accelerator is None else accelerator.reduce(sums, reduction="sum")
            found[name] = float(total[0] / total[1].clamp(min=1))
        for name, peak in self._largest.items():
            every = peak[None] if accelerator is None else accelerator.gather(peak[None])
            found[f"{name}_max"] = float(every.max())
        self._sums, self._largest = {}, {}
        return found
