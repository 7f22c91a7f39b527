"""The tasks' own scores (reasoning_gym)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any


def score(answer: str, task: Mapping[str, Any], threshold: float | None) -> tuple[float | None, str]:
    """The score of an answer to a row's `task`, and what it counts as beside that ("": nothing).

    With a threshold 1 or 0, else the task's own, 0 to 1. None where the task cannot be made again, which is not the
    answer's fault.

    Raises:
        Exception: whatever the task's own `score_answer` raises.
    """
    try:
        generator = generator_of(task)
        entry = generator[task["index"]]
    except Exception:  # noqa: BLE001  (a task's own code; its exceptions have no common base)
        return None, "gold_failures"
    native = own_score(generator, answer, entry)
    return (native if threshold is None else float(native >= threshold)), ""


def own_score(generator: Any, answer: str, entry: dict[str, Any]) -> float:
    """What `score_answer` says, checked. Raises ValueError for what is no finite number."""
    native = float(generator.score_answer(answer, entry))
    if not math.isfinite(native):
        raise ValueError(f"score_answer gave {native}")
    return native


def generator_of(task: Mapping[str, Any]) -> Any:
    """The generator of a row's task, kept for the next row."""
    return make_generator(task["name"], json.dumps(task["settings"], sort_keys=True), task["seed"], task["size"])


@lru_cache(maxsize=256)
def make_generator(name: str, settings: str, seed: int, size: int) -> Any:
    """A generator of `reasoning_gym` with these settings (JSON). Raises what it raises for settings it refuses."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(settings), seed=seed, size=size)
