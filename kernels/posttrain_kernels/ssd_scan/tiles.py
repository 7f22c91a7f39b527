"""Launch shapes of the scan: plain numbers, chosen from shapes alone, so that a captured graph keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

WIDTHS = (16, 32, 64, 128)
"""Head and state widths of the kernels."""
MULTIPROCESSORS = 132
"""Of an H100 or H200. On another card only the choice of segments is less even."""
SEGMENT_MULTIPLE = 128
"""Segments are whole chunks of every tile; and SEGMENT_LEAST tokens, since each costs two more passes over x and b."""
SEGMENT_LEAST = 512


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        chunk: tokens of an iteration, a power of two, 16 at least.
        width: columns of the head width P of a program, at most (the gradients need all of them in one).
        warps: of a program; stages: chunks in flight.
    """

    chunk: int
    width: int
    warps: int
    stages: int

    def cut(self, chunk: int, head: int) -> Tile:
        """The tile for a caller who wants `chunk` tokens at most, and heads `head` wide."""
        asked = max(16, 1 << (max(chunk, 1).bit_length() - 1))
        return replace(self, chunk=min(self.chunk, asked), width=min(self.width, head))


@dataclass(frozen=True)
class Plan:
    """Tiles of the three passes, and the tokens of a segment (a multiple of every chunk; None: the whole row).

    `states` gives chunk states to `backward`, and so has its chunk.
    """

    forward: Tile
    states: Tile
    backward: Tile
    segment: int | None = None

    def __post_init__(self) -> None:
        chunks = (self.forward.chunk, self.states.chunk, self.backward.chunk)
        if chunks[1] != chunks[2] or self.segment is not None and any(self.segment % chunk for chunk in chunks):
            raise ValueError(f"chunks of {chunks} tokens do not fit each other or segments of {self.segment}")


FORWARD = {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2)}
STATES = {64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 4, 3)}
BACKWARD = {64: Tile(32, 128, 4, 2), 128: Tile(32, 128, 8, 1)}
"""By the wider of P and N (at most), for 16-bit operands. Those of 64 were the fastest on an H100
(`scripts/tune_ssd_scan.py --groups 32 32 32`); those of 128 were chosen by what the compiler says."""
WIDE_ELEMENTS = (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 128, 8, 1))
"""Forward, states and backward where products have fp32 operands: right, not fast."""


def choose_plan(
    lines: int, tokens: int, head: int, state: int, itemsize: int, chunk: int, loaded: int | None = None
) -> Plan:
    """The plan for `lines` rows times heads, P = `head` and N = `state`.

    Operands of products have `itemsize` bytes; inputs are `loaded` with as many or more.
    """
    widest = 64 if max(head, state) <= 64 else 128
    chosen = (FORWARD[widest], STATES[widest], BACKWARD[widest]) if itemsize == 2 else WIDE_ELEMENTS
    forward, states, backward = (tile.cut(chunk, head) for tile in chosen)
    states = replace(states, chunk=backward.chunk)
    if (loaded or itemsize) > itemsize:  # chunks in flight take twice the shared memory
        forward, states = (replace(tile, stages=min(2, tile.stages)) for tile in (forward, states))
        backward = replace(backward, stages=1)
    return Plan(forward, states, backward, choose_segment(lines * (head // forward.width), tokens))


def choose_segment(programs: int, tokens: int) -> int | None:
    """Tokens of a segment where `programs` whole rows would leave half of the card idle, else None.

    A second pass over x and b and two more launches cost about what they save while every other multiprocessor works.
    """
    segments = min(2 * MULTIPROCESSORS // max(programs, 1), tokens // SEGMENT_LEAST)
    if 2 * programs > MULTIPROCESSORS or segments < 2:
        return None
    return -(-tokens // (segments * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE


def candidates(head: int, state: int, itemsize: int) -> dict[str, list[Tile]]:
    """Tiles that tuning may choose for `forward`, `states` and `backward`: the GPU tests judge each by itself."""
    chunks, stages = ((32, 64, 128), (2, 3)) if itemsize == 2 else ((16, 32), (1, 2))
    widths = sorted({min(head, width) for width in (32, 64)})
    scan = [Tile(*shape) for shape in product(chunks, widths, (4, 8), stages)]
    back = [Tile(chunk, head, *shape) for chunk, *shape in product(chunks, (4, 8), (1, 2))]
    # An accumulator [chunk, chunk] or [N, P] of more registers than a thread has is spilled: never fast.
    back = [t for t in back if max(t.chunk**2, head * state, t.chunk * max(head, state)) <= t.warps * 32 * 64]
    scan = [t for t in scan if max(t.chunk**2, state * t.width, t.chunk * t.width) <= t.warps * 32 * 128]
    return {"forward": scan, "states": scan, "backward": back}
