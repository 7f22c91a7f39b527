"""Which captured steps are kept."""

from __future__ import annotations

from posttrain.generation import Sampling
from posttrain.generation.graphs import MOST_PROGRAMS, Captured


def test_a_graph_is_captured_once() -> None:
    captured, made = Captured(), []
    for rows in (8, 16, 8, 16):
        assert captured.get("greedy", rows, lambda rows=rows: made.append(rows) or rows) == rows
    assert made == [8, 16] and len(captured) == 2


def test_the_program_that_was_used_longest_ago_goes_with_all_its_batch_sizes() -> None:
    captured, made = Captured(most=2), []

    def use(program: str, rows: int) -> None:
        captured.get(program, rows, lambda: made.append((program, rows)))

    for program, rows in (("a", 8), ("a", 16), ("b", 8), ("a", 8), ("c", 8)):
        use(program, rows)
    assert set(captured.programs) == {"a", "c"} and len(captured) == 3
    made.clear()
    use("a", 16)
    assert made == []
    use("b", 8)
    assert made == [("b", 8)] and set(captured.programs) == {"a", "b"}


def test_the_others_are_still_there_during_a_capture() -> None:
    captured = Captured(most=1)
    captured.get("a", 8, object)
    captured.get("b", 8, lambda: [len(captured)])
    assert captured.get("b", 8, object) == [1], "the pool that graphs share is in use at every moment"
    assert len(captured) == 1


def test_a_capture_that_fails_leaves_nothing() -> None:
    captured = Captured()
    try:
        captured.get("a", 8, lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    assert not captured.programs


def test_an_annealed_temperature_keeps_a_handful() -> None:
    captured = Captured()
    for step in range(50):
        for rows in (8, 16, 32):
            captured.get(Sampling(temperature=1 - step / 100).program(), rows, object)
    assert len(captured) == 3 * MOST_PROGRAMS
