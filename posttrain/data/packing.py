"""Which documents go into a sequence together."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Best fit, longest first: every document goes to the fullest sequence that still holds it whole.

    The result depends on the sizes and their order alone: of documents of one size, and of sequences with equal room,
    the first comes first.

    Args:
        sizes: tokens of every document, each at most `length`.

    Returns:
        The documents' numbers, sequence by sequence.

    Raises:
        ValueError: `length` is below 1, or a document does not fit at all.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if sizes and max(sizes) > length:
        raise ValueError(f"a document of {max(sizes)} tokens does not fit a sequence of {length}")
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, sequence), sorted: the first that is large enough fits best
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        place = bisect_left(room, (sizes[number], -1))
        free, sequence = room.pop(place) if place < len(room) else (length, len(sequences))
        if sequence == len(sequences):
            sequences.append([])
        sequences[sequence].append(number)
        if free > sizes[number]:
            insort(room, (free - sizes[number], sequence))
    return sequences
