"""Launch shapes of the scan: plain numbers, chosen from shapes alone, so that a captured graph keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

WIDTHS = (16, 32, 64, 128)
"""Head and state widths of the kernels."""
MULTIPROCESSORS = 132
"""Of an H100 or H200. On another card only the choice of segments and runs is less even."""
SEGMENT_MULTIPLE = 128
"""Segments are whole chunks of every tile; and SEGMENT_LEAST tokens, since each costs two more passes over x and b."""
SEGMENT_LEAST = 512
RUN = 512
"""Tokens of a run where rows are not cut and yet leave places on the card free."""
RUNS = (256, RUN, 1024)
"""What tuning tries beside whole rows."""
RUN_FILL = 0.8
"""Of the places on the card that whole rows must take in each round: runs read x and b once more, and states besides, a
fifth of the bytes."""


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        chunk: tokens of an iteration, a power of two, 16 at least.
        width: columns of the head width P of a program, at most (the gradients need all of them in one).
        warps: of a program; stages: chunks in flight.
        tma: chunks come through the copy engine where inputs are laid out for it; tma_out: and results leave so.
        pointers: chunks in flight where the copy engine does not carry them, if not `stages`.
    """

    chunk: int
    width: int
    warps: int
    stages: int
    tma: bool = False
    tma_out: bool = False
    pointers: int | None = None

    @property
    def resident(self) -> int:
        """Programs of a multiprocessor by their registers, as many a thread as there can be; of shared memory aside."""
        return max(1, 8 // self.warps)

    def in_flight(self, carried: bool) -> int:
        """Chunks in flight, by the copy engine if `carried`."""
        return self.stages if carried or self.pointers is None else self.pointers

    def by_pointers(self) -> Tile:
        """The tile without the copy engine."""
        return replace(self, stages=self.in_flight(False), tma=False, tma_out=False, pointers=None)

    def cut(self, chunk: int, head: int) -> Tile:
        """The tile for a caller who wants `chunk` tokens at most, and heads `head` wide."""
        asked = max(16, 1 << (max(chunk, 1).bit_length() - 1))
        return replace(self, chunk=min(self.chunk, asked), width=min(self.width, head))


@dataclass(frozen=True)
class Plan:
    """Tiles of the three passes.

    Attributes:
        states: gradients of states, and states before runs, for `backward`, and so of its chunk (the states of segments
            for `forward` have that one's).
        segment: tokens that programs of `forward` walk through; None: the whole row.
        run: tokens that programs of `backward` walk through, where less than a segment. States before runs are computed
            anew, for which x and b are read once more.
    """

    forward: Tile
    states: Tile
    backward: Tile
    segment: int | None = None
    run: int | None = None

    def __post_init__(self) -> None:
        chunks = (self.forward.chunk, self.states.chunk, self.backward.chunk)
        fits = chunks[1] == chunks[2] and (self.run is None or self.run % self.backward.chunk == 0)
        if self.segment is not None:
            fits = fits and not any(self.segment % tokens for tokens in (*chunks, self.run or 1))
        if not fits:
            raise ValueError(f"chunks of {chunks} tokens, runs of {self.run} and segments of {self.segment} do not fit")


FORWARD = {
    32: Tile(64, 64, 4, 3, tma=True),
    64: Tile(64, 64, 4, 3, tma=True, tma_out=True),
    128: Tile(64, 64, 4, 4, tma=True, tma_out=True, pointers=2),
}
STATES = Tile(64, 64, 4, 3)
BACKWARD = {
    32: Tile(64, 128, 4, 2, tma=True),
    64: Tile(64, 128, 4, 2, tma=True, tma_out=True),
    128: Tile(64, 128, 8, 2, tma=True, tma_out=True),
}
"""By the wider of P and N (at most), for 16-bit operands, timed on an H200 where both are as wide
(`scripts/tune_ssd_scan.py`)."""
FORWARD_IN_LESS = FORWARD[128].by_pointers()
BACKWARD_IN_LESS = {120 * 1024: Tile(32, 128, 8, 1), 0: Tile(16, 128, 4, 1)}
"""At widths of 128 on other cards, by the shared memory that a program may have at least: A100, B200; and cards that
have 82 KiB. What fits by what the compiler says, not timed. (The tile above takes more than a B200's tensor memory.)"""
WIDE_ELEMENTS = (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 128, 8, 1))
"""Forward, states and backward where products have fp32 operands: right, not fast."""


@lru_cache
def choose_plan(
    lines: int,
    tokens: int,
    head: int,
    state: int,
    itemsize: int,
    chunk: int,
    loaded: int | None = None,
    shared_memory: int | None = None,
) -> Plan:
    """The plan for `lines` rows times heads, P = `head` and N = `state`.

    Operands of products have `itemsize` bytes; inputs are `loaded` with as many or more. `shared_memory`: bytes that a
    program may have on a card other than Hopper's.
    """
    widest = next(width for width in FORWARD if max(head, state) <= width)
    chosen = (FORWARD[widest], STATES, BACKWARD[widest]) if itemsize == 2 else WIDE_ELEMENTS
    if itemsize == 2 and widest == 128 and shared_memory is not None:
        less = next(tile for least, tile in BACKWARD_IN_LESS.items() if shared_memory >= least)
        chosen = (FORWARD_IN_LESS, STATES, less)
    forward, states, backward = (tile.cut(chunk, head) for tile in chosen)
    states = replace(states, chunk=backward.chunk)
    if min(head, state) < 32:  # narrower tiles are right with the copy engine, and were not timed
        forward, backward = forward.by_pointers(), backward.by_pointers()
    if (loaded or itemsize) > itemsize:  # chunks in flight take twice the shared memory
        forward, states = (replace(tile, stages=min(2, tile.stages)) for tile in (forward, states))
        backward = replace(backward, stages=1)
    segment = choose_segment(lines * (head // forward.width), tokens)
    return Plan(forward, states, backward, segment, None if segment else choose_run(lines, tokens, backward.resident))


def choose_segment(programs: int, tokens: int) -> int | None:
    """Tokens of a segment where `programs` whole rows would leave half of the card idle, else None.

    A second pass over x and b and two more launches cost about what they save while every other multiprocessor works.
    """
    segments = min(2 * MULTIPROCESSORS // max(programs, 1), tokens // SEGMENT_LEAST)
    if 2 * programs > MULTIPROCESSORS or segments < 2:
        return None
    return -(-tokens // (segments * SEGMENT_MULTIPLE)) * SEGMENT_MULTIPLE


def choose_run(lines: int, tokens: int, resident: int) -> int | None:
    """Tokens of a run where a program a row would fill the places on the card badly in the last round, else None.

    `resident`: programs of a multiprocessor.
    """
    places = resident * MULTIPROCESSORS
    rounds = -(-lines // places)
    return RUN if tokens > RUN and lines < RUN_FILL * rounds * places else None


def candidates(head: int, state: int, itemsize: int) -> dict[str, list[Tile]]:
    """Tiles that tuning may choose for `forward`, `states` and `backward`: the GPU tests judge each by itself.

    Chunks of 128 tokens, and 8 warps where P and N are 64 at most, took twice as long and more on an H100.
    """
    chunks, stages = ((32, 64), (2, 3)) if itemsize == 2 else ((16, 32), (1, 2))
    warps = (4,) if max(head, state) <= 64 and itemsize == 2 else (4, 8)
    widths = sorted({min(head, width) for width in (32, 64)})
    scan = [Tile(*shape) for shape in product(chunks, widths, warps, stages)]
    back = [Tile(chunk, head, *shape) for chunk, *shape in product(chunks, warps, (1, 2))]
    # An accumulator [chunk, chunk] or [N, P] of more registers than a thread has is spilled: never fast.
    back = [t for t in back if max(t.chunk**2, head * state, t.chunk * max(head, state)) <= t.warps * 32 * 64]
    scan = [t for t in scan if max(t.chunk**2, state * t.width, t.chunk * t.width) <= t.warps * 32 * 128]
    return {
        "forward": scan + _carried(scan, widths[-1]),
        "states": scan,
        "backward": back + _carried(back, head),
    }


def _carried(tiles: list[Tile], width: int) -> list[Tile]:
    """The largest of the tiles once more with the copy engine, which holds a chunk more at the same registers."""
    chunk = max((tile.chunk for tile in tiles if tile.width == width), default=0)
    largest = [tile for tile in tiles if tile.width == width and tile.chunk == chunk]
    return [replace(t, stages=t.stages + 1, tma=True, tma_out=out) for t in largest for out in (False, True)]
