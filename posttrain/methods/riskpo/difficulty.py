"""How hard questions are, from what was seen of them or of their like at earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9


class PassRates:
    """Decayed mean reward by kind of question; asked before it is told, so that no reward chooses its own company.

    Args:
        decay: weight that earlier steps keep at each step in which the kind occurs.
    """

    def __init__(self, decay: float = DECAY) -> None:
        self.decay = decay
        self.rates: dict[str, float] = {}

    def difficulty(self, kinds: Sequence[str]) -> Tensor:
        """`[Q]`, larger is harder; a kind not met before is as hard as the average of those met."""
        known = list(self.rates.values())
        usual = sum(known) / len(known) if known else 0.0
        return torch.tensor([-self.rates.get(kind, usual) for kind in kinds], dtype=torch.float64)

    def update(self, kinds: Sequence[str], rewards: Tensor) -> None:
        """Take in a step's mean rewards `[Q]`; NaN is left out."""
        found: dict[str, list[float]] = {}
        for kind, reward in zip(kinds, rewards.tolist(), strict=True):
            if reward == reward:
                found.setdefault(kind, []).append(reward)
        for kind, values in found.items():
            new = sum(values) / len(values)
            self.rates[kind] = new if kind not in self.rates else self.decay * self.rates[kind] + (1 - self.decay) * new

    def state_dict(self) -> dict[str, Any]:
        """Rates by kind."""
        return {"rates": self.rates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the rates."""
        self.rates = dict(state["rates"])


def kind_of(row: Mapping[str, Any]) -> str:
    """What a question has in common with its like: a generated task's name and difficulty, else itself."""
    task = row.get("task")
    if isinstance(task, Mapping) and "name" in task:
        return f"{task['name']}/{task.get('difficulty', '')}"
    return str(row.get("id", ""))
