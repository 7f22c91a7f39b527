"""Which of several ranks that ended together is named."""

from __future__ import annotations

import pytest

from posttrain.launch.agent import first_to_end


@pytest.mark.parametrize(
    ("failures", "blamed"),
    [
        ([(0, 10, 1), (1, 11, -9)], 1),  # killed; the other lost its connection
        ([(0, 10, -15), (1, 11, 1)], 1),  # the agent ended rank 0 because of rank 1
        ([(0, 10, 143), (1, 11, 1)], 1),  # the same, of a rank that ended itself at the agent's signal
        ([(2, 12, 1), (1, 11, 1)], 1),
        ([(0, 10, -15), (1, 11, -11), (2, 12, 1)], 1),
    ],
)
def test_a_killed_rank_is_blamed_before_those_that_it_left_behind(failures, blamed: int):
    assert first_to_end(failures)[0] == blamed
