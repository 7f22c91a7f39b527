"""The captured steps of an engine: few programs, each with its batch sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

MOST_PROGRAMS = 4
"""Sampling settings whose captured steps are kept; each holds a graph a batch size and the memory of its kernels."""


class Captured:
    """Graphs by program and batch size. A new program beyond the most makes the least recently used one go.

    Whole programs go, not single graphs: a roll-out passes through all its batch sizes again in the next wave.
    """

    def __init__(self, most: int = MOST_PROGRAMS) -> None:
        self.most = most
        self.programs: OrderedDict[Hashable, dict[int, Any]] = OrderedDict()

    def get(self, program: Hashable, rows: int, capture: Callable[[], Any]) -> Any:
        """The graph of this program and batch size, captured if there is none."""
        graphs = self.programs.get(program, {})
        if rows not in graphs:
            # Captured before others go: the memory pool that all share must not lose its last user.
            graphs[rows] = capture()
            self.programs[program] = graphs
        self.programs.move_to_end(program)
        while len(self.programs) > self.most:
            self.programs.popitem(last=False)
        return graphs[rows]

    def __len__(self) -> int:
        """Graphs held."""
        return sum(map(len, self.programs.values()))
