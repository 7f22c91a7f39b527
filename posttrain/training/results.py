"""What training stages write and measure when they are done; imports torch only where a device is asked."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.training.estimate import ELEMENT_SIZE

if TYPE_CHECKING:
    from torch import nn


def write_history(folder: Path, history: Iterable[Mapping[str, float]]) -> None:
    """Write a history artifact: one row a step."""
    from posttrain.pipeline.files import write_text

    write_text(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history))


def disk_needed(model: nn.Module, keep_checkpoints: int, save_dtype: str) -> int:
    """Bytes of the kept checkpoints with one in the making (weights and two moments), and of the saved model."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total = sum(size for size, _ in sizes)
    checkpoint = 4 * total + 8 * sum(size for size, trained in sizes if trained)
    return (keep_checkpoints + 1) * checkpoint + ELEMENT_SIZE[save_dtype] * total


def reset_peak_memory(device: str) -> None:
    """Count the device's peak memory from now on."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> int:
    """Peak bytes of the device's memory, or of this process on a CPU (loading and libraries included)."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_tenth(history: list[dict[str, Any]], name: str) -> float:
    """Mean of a number over the last tenth of the steps."""
    tail = history[-max(1, len(history) // 10) :]
    return sum(row[name] for row in tail) / len(tail)
