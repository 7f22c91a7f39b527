"""Answers that are the right one as mathematics, and attacks on what compares them."""

from __future__ import annotations

import signal

import pytest

from posttrain.rewards import math
from posttrain.rewards.math import score


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        ("$12", "12"),
        ("12 apples", "12"),
        ("x^2+2x+1", "(x+1)^2"),
        ("10%", "0.1"),
        ("1,000", "1000"),
        ("(1,2)", "(1, 2)"),
        (r"\boxed{7}", "7"),
        ("$7$", "7"),
        ("5 cm", r"5\text{ cm}"),
        (r"\sqrt{2}", "1.4142135"),
        ("x=5", "5"),
        ("A", r"\text{A}"),
        ("\0 7", "7"),
        (r"\pi", "π"),
        ("4", "so it is 3 + 1 = 4\n#### 4"),
    ],
)
def test_equal(answer, gold) -> None:
    assert score(answer, gold, 6) == (1.0, "")


@pytest.mark.parametrize(
    "answer, gold",
    [("3", "4"), ("1/3", "0.33"), ("(2,1)", "(1,2)"), ("x", "y"), ("-4", "4"), ("4 and 5", "4"), ("B", "A")],
)
def test_not_equal(answer, gold) -> None:
    assert score(answer, gold, 6) == (0.0, "")


def test_decimals_decide_how_near_is_equal() -> None:
    assert score("0.3334", "0.3333", 6) == (0.0, "") and score("0.3334", "0.3333", 3) == (1.0, "")


def test_a_side_that_cannot_be_parsed() -> None:
    assert score("no number here", "4", 6) == (0.0, "parse_failures")
    assert score("4", "no number here", 6) == (None, "gold_failures")
    assert score("4", "", 6) == (None, "gold_failures")
    assert score("4" + " " * math.LONGEST, "4", 6) == (0.0, "parse_failures")


def test_the_right_answer_comes_first() -> None:
    """The comparison is not symmetric: an equation may be answered by its right side, and not the other way round."""
    assert score("5", "x=5", 6)[0] == 1.0
    from math_verify import verify

    seen = []
    original = math.verify
    math.verify = lambda gold, found, **settings: seen.append((gold, found)) or verify(gold, found, **settings)
    try:
        score("3", "4", 6)
    finally:
        math.verify = original
    assert str(seen[0][0][0]) == "4" and str(seen[0][1][0]) == "3"


def test_no_alarm_is_set() -> None:
    def unexpected(*_):
        raise AssertionError("an alarm signal is used")

    before = signal.getsignal(signal.SIGALRM)
    own, signal.alarm = signal.alarm, unexpected
    try:
        assert score("17+1", "18", 6) == (1.0, "")
    finally:
        signal.alarm = own
    assert signal.getsignal(signal.SIGALRM) is before
