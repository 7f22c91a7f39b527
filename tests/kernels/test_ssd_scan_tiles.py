"""Launch shapes of the scan, as numbers: what is chosen, and that tuning's candidates hold it."""

from __future__ import annotations

import pytest
from posttrain_kernels.ssd_scan.tiles import (
    MULTIPROCESSORS,
    RUN,
    RUNS,
    SEGMENT_LEAST,
    SEGMENT_MULTIPLE,
    WIDTHS,
    Plan,
    Tile,
    candidates,
    choose_plan,
    choose_run,
    choose_segment,
)


@pytest.mark.parametrize("head", WIDTHS)
@pytest.mark.parametrize("state", WIDTHS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_chosen_is_among_the_candidates_that_are_judged(head, state, itemsize):
    plan, judged = choose_plan(256, 4096, head, state, itemsize, 64), candidates(head, state, itemsize)
    assert plan.forward in judged["forward"] and plan.states in judged["states"] and plan.backward in judged["backward"]
    assert plan.backward.width == head and head % plan.forward.width == 0


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 16), (16, 16), (63, 32), (64, 64), (500, 64)])
def test_a_caller_may_ask_for_shorter_chunks(chunk, tokens):
    plan, own = choose_plan(256, 4096, 64, 64, 2, chunk), choose_plan(256, 4096, 64, 64, 2, 64)
    assert plan.forward.chunk == min(tokens, own.forward.chunk)
    assert plan.states.chunk == plan.backward.chunk == min(tokens, own.backward.chunk)


def test_rows_are_cut_where_they_leave_the_card_idle():
    assert choose_segment(256, 2**15) is None and choose_segment(MULTIPROCESSORS // 2 + 1, 2**15) is None
    assert choose_segment(1, SEGMENT_LEAST) is None and choose_segment(8, 2 * SEGMENT_LEAST - 1) is None
    for programs, tokens in ((8, 8191), (32, 4096), (66, 2048), (1, 10**6)):
        segment = choose_segment(programs, tokens)
        assert segment % 128 == 0 and segment >= SEGMENT_LEAST
        assert MULTIPROCESSORS // 2 < programs * -(-tokens // segment) <= 2 * MULTIPROCESSORS or segment < 1024


def test_backward_has_runs_where_whole_rows_leave_places_free():
    places = 2 * MULTIPROCESSORS
    assert choose_run(256, 4096) is None and choose_run(places, 4096) is None and choose_run(2 * places, 4096) is None
    assert choose_run(128, 4096) == choose_run(places + 1, 4096) == RUN
    assert choose_run(128, RUN) is None, "one run is the row"
    plan = choose_plan(128, 4096, 64, 64, 2, 64)
    assert (plan.segment, plan.run) == (None, RUN)
    few = choose_plan(8, 16384, 64, 64, 2, 64)
    assert few.segment is not None and few.run is None, "segments are the runs"


def test_segments_and_runs_are_whole_chunks_and_states_have_the_chunks_of_the_gradients():
    tile = Tile(64, 64, 4, 1)
    for wrong in (dict(segment=96), dict(run=96), dict(segment=512, run=384)):
        with pytest.raises(ValueError, match="do not fit"):
            Plan(tile, tile, tile, **wrong)
    with pytest.raises(ValueError, match="do not fit"):
        Plan(tile, Tile(32, 64, 4, 1), tile)
    chunks = {t.chunk for itemsize in (2, 4) for kind in candidates(64, 64, itemsize).values() for t in kind}
    assert all(tokens % chunk == 0 for tokens in (*RUNS, SEGMENT_MULTIPLE) for chunk in chunks)
