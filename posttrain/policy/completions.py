"""Some completions of every roll-out batch with their scores, as lines of JSON that a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "completions.jsonl"


class CompletionLog:
    """Keeps `count` completions of every batch in the work folder; 0 keeps none."""

    def __init__(self, work_dir: Path, count: int) -> None:
        self.path, self.count = work_dir / FILE, count

    def start(self, step: int) -> None:
        """Forget batches after that optimiser step: an interrupted attempt wrote them, and they will come again."""
        if not self.count:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step(line) < step]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, step: int, logs: Mapping[str, Any]) -> None:
        """Take some completions of the batch written after that step, evenly spaced over TRL's `_logs`."""
        total = len(logs["completion"])
        if not self.count or not total:
            return
        with self.path.open("a", encoding="utf-8") as file:
            for number in range(0, total, -(-total // self.count)):
                row = {
                    "step": step,
                    "prompt": logs["prompt"][number],
                    "completion": logs["completion"][number],
                    "rewards": {name: _number(values[number]) for name, values in logs["rewards"].items()},
                    "advantage": logs["advantages"][number],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _step(line: str) -> float:
    """The step of a line; a line that a kill cut short is after all."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _number(value: float) -> float | None:
    return None if value != value else value
