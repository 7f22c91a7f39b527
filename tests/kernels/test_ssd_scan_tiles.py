"""Launch shapes of the scan, as numbers: what is chosen, and that tuning's candidates hold it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
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
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.mark.parametrize("head", WIDTHS)
@pytest.mark.parametrize("state", WIDTHS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_chosen_is_among_the_candidates_that_are_judged(head, state, itemsize):
    plan, judged = choose_plan(256, 4096, head, state, itemsize, 64), candidates(head, state, itemsize)
    assert plan.states in judged["states"]
    for tile, of in ((plan.forward, judged["forward"]), (plan.backward, judged["backward"])):
        assert replace(tile, pointers=None) in of
        assert tile.by_pointers() in of
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
    for resident in (1, 2):
        places = resident * MULTIPROCESSORS
        assert all(choose_run(lines, 4096, resident) is None for lines in (places, places - 8, 2 * places))
        assert choose_run(places // 2, 4096, resident) == choose_run(places + 1, 4096, resident) == RUN
        assert choose_run(places // 2, RUN, resident) is None, "one run is the row"
    plan = choose_plan(128, 4096, 64, 64, 2, 64)
    assert (plan.segment, plan.run) == (None, RUN)
    assert choose_plan(128, 4096, 128, 128, 2, 64).run is None, "programs of 8 warps are one a multiprocessor"
    few = choose_plan(8, 16384, 64, 64, 2, 64)
    assert few.segment is not None and few.run is None, "segments are the runs"


def test_wide_heads_take_less_on_cards_other_than_hopper():
    def plan(shared_memory: int | None, width: int = 128) -> Plan:
        return choose_plan(256, 4096, width, width, 2, 64, None, shared_memory)

    hopper, blackwell, ampere, ada = (plan(kib and kib * 1024) for kib in (None, 227, 163, 99))
    assert blackwell == ampere, "a Hopper card's bytes, but less of another memory"
    assert hopper.backward.chunk > ampere.backward.chunk > ada.backward.chunk
    assert not any(tile.tma for less in (ampere, ada) for tile in (less.forward, less.backward))
    assert plan(99 * 1024, 64) == plan(None, 64)


@pytest.mark.parametrize(
    ("generation", "kib", "hopper", "limit"), [(8, 99, False, 255), (9, 227, True, None), (12, 99, False, None)]
)
def test_a_launch_asks_what_card_it_is_on(generation, kib, hopper, limit, monkeypatch):
    launch = pytest.importorskip("posttrain_kernels.ssd_scan.launch")
    monkeypatch.setattr(launch, "nvidia_generation", lambda device: generation)
    monkeypatch.setattr(launch, "shared_memory", lambda device: kib * 1024)
    with FakeTensorMode():
        x = torch.empty(2, 64, 4, 128, dtype=torch.bfloat16, device="cuda:0")
        scan = launch.Scan.of(x, torch.empty(2, 64, 4, device="cuda:0"), torch.empty(4), x, x, None, None, 64)
    assert scan.plan == choose_plan(8, 64, 128, 128, 2, 64, 2, None if hopper else kib * 1024)
    assert scan.options.get("maxnreg") == limit


def test_the_wider_of_head_and_state_decides():
    square = {width: choose_plan(256, 4096, width, width, 2, 64) for width in (64, 128)}
    for head, state in ((64, 128), (128, 64), (16, 128), (32, 64), (64, 32)):
        plan, wide = choose_plan(256, 4096, head, state, 2, 64), square[max(head, state)]
        assert (plan.backward.chunk, plan.backward.warps) == (wide.backward.chunk, wide.backward.warps)
        assert plan.backward.tma_out == (min(head, state) >= 32)
        assert plan.forward.stages in (wide.forward.stages, wide.forward.pointers)


def test_chunks_in_flight_are_as_many_as_by_pointers_where_the_copy_engine_does_not_carry_them():
    tile = Tile(64, 64, 4, 4, tma=True, pointers=2)
    assert (tile.in_flight(True), tile.in_flight(False)) == (4, 2)
    assert replace(tile, pointers=None).in_flight(False) == 4


def test_segments_and_runs_are_whole_chunks_and_states_have_the_chunks_of_the_gradients():
    tile = Tile(64, 64, 4, 1)
    for wrong in (dict(segment=96), dict(run=96), dict(segment=512, run=384)):
        with pytest.raises(ValueError, match="do not fit"):
            Plan(tile, tile, tile, **wrong)
    with pytest.raises(ValueError, match="do not fit"):
        Plan(tile, Tile(32, 64, 4, 1), tile)
    chunks = {t.chunk for itemsize in (2, 4) for kind in candidates(64, 64, itemsize).values() for t in kind}
    assert all(tokens % chunk == 0 for tokens in (*RUNS, SEGMENT_MULTIPLE) for chunk in chunks)
