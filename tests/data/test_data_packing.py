"""Best fit: every document once, nothing over the edge, and as tight as the rule says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.packing import best_fit


def by_hand(sizes: list[int], length: int) -> list[list[int]]:
    """The rule word for word, in quadratic time."""
    sequences: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        room = [length - sum(sizes[member] for member in members) for members in sequences]
        fitting = [(left, place) for place, left in enumerate(room) if left >= sizes[number]]
        if fitting:
            sequences[min(fitting)[1]].append(number)
        else:
            sequences.append([number])
    return sequences


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=40), st.just(n))))
def test_the_rule(case: tuple[list[int], int]) -> None:
    sizes, length = case
    found = best_fit(sizes, length)
    assert sorted(number for members in found for number in members) == list(range(len(sizes)))
    assert found == by_hand(sizes, length)


def test_a_tight_case() -> None:
    assert best_fit([3, 5, 2, 7, 3], 10) == [[3, 0], [1, 4, 2]]


@pytest.mark.parametrize(("sizes", "length", "message"), [([1], 0, "at least 1"), ([4, 9], 8, "9 tokens does not fit")])
def test_what_cannot_fit(sizes: list[int], length: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_fit(sizes, length)
