"""Launch shapes of decode attention: plain numbers, chosen from shapes alone, so that a captured graph keeps them."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 264
"""Programs that keep an H200 busy, two for each of its 132 multiprocessors; with fewer, rows are split."""
SLOTS_PER_SPLIT = 256
"""Capacity worth a split: streaming fewer slots costs about what the second kernel costs."""
HEADS_AT_MOST = 32
"""Query heads of a program; the accumulator of more heads at r = 512 would not stay in registers."""


@dataclass(frozen=True)
class Tile:
    """How one program works.

    Attributes:
        dot: tensor cores with the query heads padded to 16 rows, instead of multiply and sum in fp32.
        heads: query heads of a program, a power of two (16 at least with `dot`).
        slots: cache slots of an iteration; stages: iterations in flight; warps: of a program.
    """

    dot: bool
    heads: int
    slots: int
    warps: int
    stages: int


TILES = {64: (64, 4, 3), 128: (64, 4, 3), 256: (32, 4, 3), 512: (32, 8, 3)}
"""(slots, warps, stages) by the wider of keys and values, rounded up to one of these widths.

Not tuned on a device yet. From the compiler for sm_90 with bf16: no spills, 66 to 172 registers, 16-byte asynchronous
copies; the sums of the other variant cost over 200 shuffles an iteration even for one query head, so no entry uses it.
"""


def choose_tile(group: int, width: int, value_width: int) -> Tile:
    """The tile for `group` query heads a key/value head, keys `width` and values `value_width` wide (elements).

    Raises:
        ValueError: wider than 512.
    """
    widest = max(width, value_width)
    if widest > max(TILES):
        raise ValueError(f"keys or values {widest} wide; the kernels go up to {max(TILES)}")
    slots, warps, stages = TILES[next(limit for limit in TILES if widest <= limit)]
    return Tile(True, max(16, _power_of_two(min(group, HEADS_AT_MOST))), slots, warps, stages)


def choose_splits(programs: int, capacity: int) -> int:
    """Programs that share one row's slots, for `programs` unsplit ones and a cache of `capacity` slots."""
    return max(1, min(PROGRAMS // max(1, programs), -(-capacity // SLOTS_PER_SPLIT)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
