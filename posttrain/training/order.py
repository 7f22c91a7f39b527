"""The order in which a run uses its rows: every epoch is a permutation, made of seed and epoch alone."""

from __future__ import annotations

import torch
from torch import Tensor


def run_order(rows: int, total: int, seed: int) -> Tensor:
    """Row numbers of the whole run, [total] int64: item i is the i-th row used, whatever the micro-batch.

    A resumed run uses the same rows at the same steps, because the order depends on nothing that happened before.

    Raises:
        ValueError: no rows to choose from.
    """
    if rows < 1:
        raise ValueError("no rows to train on")
    epochs = [
        torch.randperm(rows, generator=torch.Generator().manual_seed((seed << 20) + epoch))
        for epoch in range(-(-total // rows))
    ]
    return torch.cat(epochs)[:total] if epochs else torch.empty(0, dtype=torch.long)
