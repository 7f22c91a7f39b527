"""The Triton scan on the CPU, in fp32, against the recurrence in fp64: values, states and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import poisoned, randn, relative_error
from posttrain_kernels.ssd_scan import op, ssd_scan, ssd_scan_reference, ssd_step, ssd_step_reference
from posttrain_kernels.ssd_scan.launch import Scan, product_type
from posttrain_kernels.ssd_scan.tiles import Plan, Tile
from posttrain_kernels.ssd_scan.triton_scan import triton_scan
from ssd_scan_cases import NAMES, documents, inputs, judge

pytestmark = pytest.mark.usefixtures("poison_empty")

LAYOUTS = [(4, 4, 4), (2, 2, 4), (4, 1, 1)]
"""Heads of x, b and c: all; shared values and keys of grouped-query attention; stock with one group."""


def plan(segment=None, forward=16, backward=16, width=16, run=None, tma=False):
    """Tiles small enough that every loop runs several times and ends ragged."""
    tiles = (Tile(forward, width, 4, 1), Tile(backward, width, 4, 1), Tile(backward, 32, 4, 1))
    return Plan(*(replace(tile, tma=tma, tma_out=tma) for tile in tiles), segment, run)


PACKED = documents(1, 37, 16, 17, 30)
"""A document from the border of a chunk on, one of a token, one that begins within a chunk."""


@pytest.mark.parametrize("ids", [None, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_documents(layout, ids):
    judge(ssd_scan_reference, inputs(layout), ids, 1e-6, of_a=2e-5, plan=plan())


@pytest.mark.parametrize("length", [1, 5, 16, 33])
def test_lengths_below_at_and_beyond_a_chunk(length):
    judge(ssd_scan_reference, inputs((1, 1, 2), length=length, heads=2), None, 1e-6, of_a=2e-5, plan=plan())


@pytest.mark.parametrize("ids", [None, documents(1, 70, 32, 50), documents(1, 70, 3, 69)], ids=["one", "border", "in"])
@pytest.mark.parametrize(("segment", "run"), [(16, None), (32, None), (32, 16), (None, 16), (None, 32)])
def test_rows_in_segments_and_runs(segment, run, ids):
    tensors = inputs((1, 2, 2), length=70, heads=2, decay=0.1)  # slow: states reach across segments
    judge(ssd_scan_reference, tensors, ids, 1e-6, of_a=2e-5, plan=plan(segment, run=run))


@pytest.mark.parametrize(("head", "state"), [(32, 16), (16, 32)])
def test_several_rows_widths_and_blocks_of_columns(head, state):
    tensors = inputs((1, 2, 1), rows=2, length=21, heads=2, head=head, state=state)
    ids = documents(2, 21, 5)
    judge(ssd_scan_reference, tensors, ids, 1e-6, of_a=2e-5, plan=plan(forward=32))


@pytest.mark.parametrize("ids", [None, documents(2, 64, 16, 33)], ids=["one", "packed"])
@pytest.mark.parametrize(("segment", "run", "width"), [(None, None, 32), (32, None, 16), (None, 32, 16)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_copy_engine(layout, segment, run, width, ids):
    tensors = inputs(layout, rows=2, length=64, head=32, decay=0.1)
    judge(ssd_scan_reference, tensors, ids, 1e-6, of_a=2e-5, plan=plan(segment, 32, 16, width, run, tma=True))


def test_the_copy_engine_on_slices_of_one_projection():
    tensors = inputs((2, 2, 2), rows=2, heads=2, length=32)
    x, b, c = torch.cat([tensors[i].flatten(2) for i in (0, 3, 4)], -1).split(32, dim=-1)
    tensors[0], tensors[3], tensors[4] = (part.unflatten(2, (2, 16)) for part in (x, b, c))
    scan = Scan.of(*tensors[:6], None, 64, plan(tma=True))
    assert scan.copied(scan.plan.forward, scan.x, scan.b, scan.c)
    y, last = triton_scan(*tensors, None, 64, plan(tma=True))
    expected, state = ssd_scan_reference(*(t.double() for t in tensors[:6]), initial_state=tensors[6].double())
    assert relative_error(y, expected) < 1e-6 and relative_error(last, state) < 1e-6


def test_what_the_copy_engine_cannot_carry():
    x, dt, a, b, c, d, _ = inputs((2, 2, 2), rows=2, heads=2, length=48)
    scan = Scan.of(x, dt, a, b, c, d, None, 64, plan(tma=True))
    tile = scan.plan.forward
    assert scan.copied(tile, x, b, c) and not scan.copied(replace(tile, tma=False), x)
    assert not scan.copied(replace(tile, chunk=32), x)  # a ragged chunk
    assert not scan.copied(tile, x, torch.cat([b, b], 1)[:, :48])  # rows with gaps between them
    assert not scan.copied(tile, x.transpose(1, 2).contiguous().transpose(1, 2))  # heads before tokens
    assert not scan.copied(tile, torch.zeros(2 * 48 * 32 + 1)[1:].view(x.shape))  # not on 16 bytes
    assert not scan.copied(tile, x.half())


@pytest.mark.parametrize("decay", [1e-4, 20.0])
def test_slow_and_fast_decays(decay):
    found = judge(ssd_scan_reference, inputs((2, 2, 2), heads=2, decay=decay), None, 2e-6, of_a=2e-5, plan=plan())
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("segment", [None, 32])
def test_neighbours_after_a_strong_decay(segment):
    """fp32 sums of large exponents lose the small differences of neighbours: outputs were off by percents."""
    tensors = inputs((1, 1, 1), heads=1)
    dt = torch.full_like(tensors[1], 1e-3)
    dt[:, :20] = 40.0
    tensors[1:3] = [dt, torch.full_like(tensors[2], -16.0)]
    y = judge(ssd_scan_reference, tensors, None, 5e-6, plan=plan(segment, forward=32, backward=32))[0]
    expected, _ = ssd_scan_reference(*(t.double() for t in tensors[:6]), initial_state=tensors[6].double())
    assert relative_error(y[:, 20:], expected[:, 20:]) < 5e-6


def test_gradients_of_step_sizes_and_decays_among_strong_decays():
    """A token that nothing crosses: what it gives to itself must cancel to nothing, not to rounding."""
    tensors = inputs((1, 1, 1), heads=1, length=32)
    tensors[1:3] = [torch.full_like(tensors[1], 1.0), torch.full_like(tensors[2], -20.0)]
    # fp32 exponents of -29 are off by 2e-6, and so is exp.
    judge(ssd_scan_reference, tensors, None, 1e-6, of_a=1e-5, plan=plan())


@pytest.fixture
def apart(tmp_path):
    """Copies of fp16 tensors whose heads lie so far apart that head times stride passes 2^31, though neither does."""
    # Mostly a hole in a file: a wrapped address lies in it and gives zeros.
    room = torch.from_file(str(tmp_path / "room"), shared=True, size=2 * (2**31 + 2**20), dtype=torch.float16)

    def copy(tensor, number):
        """[1, T, H, ·] with tokens next to each other; `number`: of the copy, each has a place of its own."""
        strides = (0, tensor.shape[-1], 2**30 + 16, 1)
        return room.as_strided(tensor.shape, strides, 2**31 + 4096 * number).copy_(tensor)

    return copy


def test_heads_further_apart_than_32_bits_count(apart):
    """Heads before tokens, in a long row."""
    x, dt, a, b, c, *_ = inputs((3, 3, 3), length=21, heads=3, dtype=torch.float16)
    near = [x, dt.half()[..., None], b, c, randn(1, 21, 3, 16, seed=9, dtype=torch.float16)]
    found = []
    for x, dt, b, c, grad in (near, [apart(tensor, number) for number, tensor in enumerate(near)]):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, dt[..., 0], a, b, c)]
        y, last = triton_scan(*leaves, None, None, None, 64, plan(run=16))
        found.append((y, last, *torch.autograd.grad(y, leaves, grad)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_step_of_heads_further_apart_than_32_bits_count(apart, triton_alone):
    x, dt, a, b, c, d, state = inputs((3, 3, 3), length=1, heads=3, dtype=torch.float16)
    near = [x, dt.half()[..., None], b, c]
    found = []
    for tensors in (near, [apart(tensor, number) for number, tensor in enumerate(near)]):
        x, dt, b, c = (tensor[:, 0] for tensor in tensors)
        cache = state.clone()
        found.append((ssd_step(x, dt[..., 0], a, b, c, cache, d), cache))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_token_of_no_length_is_not_there():
    tensors = inputs((2, 2, 2), heads=2, length=21)
    tensors[1] = tensors[1].clone()
    tensors[1][:, :6] = 0
    y, last, *_ = judge(ssd_scan_reference, tensors, None, 1e-6, of_a=2e-5, plan=plan())
    x, dt, a, b, c, d, state = tensors
    rest, end = triton_scan(x[:, 6:], dt[:, 6:], a, b[:, 6:], c[:, 6:], d, state, None, 64, plan())
    assert relative_error(y[:, 6:], rest) < 1e-6 and relative_error(last, end) < 1e-6


def test_fp16_inputs_have_fp32_states_and_gradients_of_their_types():
    tensors = inputs((1, 2, 2), heads=2, dtype=torch.float16)
    _, last, *_ = judge(ssd_scan_reference, tensors, None, 1e-3, plan=plan())
    assert last.dtype == torch.float32


@pytest.fixture
def triton_alone(monkeypatch):
    monkeypatch.setattr(op, "chunked_scan", None)
    monkeypatch.setattr(op, "single_step", None)


@pytest.mark.parametrize("chunk", [1, 16, 40])
def test_the_operator_runs_triton_on_parts_of_a_packed_projection(chunk, triton_alone):
    x, dt, a, b, c, *_ = inputs((2, 2, 2), heads=2)
    packed = torch.cat([part.flatten(2) for part in (x, b, c)], dim=-1)
    views = [part.unflatten(-1, (2, 16)) for part in packed.split(32, dim=-1)]
    assert not views[0].is_contiguous()
    y, last = ssd_scan(views[0], dt, a, *views[1:], chunk=chunk, documents=PACKED.bool())
    expected = ssd_scan_reference(*(t.double() for t in (x, dt, a, b, c)), documents=PACKED)
    assert relative_error(y, expected[0]) < 1e-6 and relative_error(last, expected[1]) < 1e-6


@pytest.mark.parametrize("run", [None, 16])
@pytest.mark.parametrize("wanted", ["y", "last"])
def test_gradients_of_one_output_without_skip_and_state(wanted, run):
    tensors = inputs((1, 2, 2), heads=2)[:5]
    leaves, wide = [t.clone().requires_grad_() for t in tensors], [t.double().requires_grad_() for t in tensors]
    found, expected = triton_scan(*leaves, None, None, None, 64, plan(run=run)), ssd_scan_reference(*wide)
    which = ("y", "last").index(wanted)
    for loss in (found[which].pow(2).sum(), expected[which].pow(2).sum()):
        loss.backward()
    for name, ours, theirs in zip(NAMES, leaves, wide, strict=False):
        if wanted == "last" and name == "c":
            assert not ours.grad.any()
        else:
            assert relative_error(ours.grad, theirs.grad) < 5e-6, name


def test_autocast_changes_nothing_and_unwanted_gradients_are_none():
    tensors = inputs((1, 2, 2), heads=2)
    tensors[0].requires_grad_()
    plain, _ = triton_scan(*tensors, None, 64, plan())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = triton_scan(*tensors, None, 64, plan())
    assert torch.equal(y, plain) and last.dtype == torch.float32
    y.sum().backward()
    assert tensors[0].grad.isfinite().all() and all(tensor.grad is None for tensor in tensors[1:])


def test_operands_are_bf16_where_all_inputs_are():
    narrow, wide = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert product_type(narrow, narrow, narrow) == torch.bfloat16
    for mixed in ((wide, narrow, narrow), (narrow, wide, narrow), (narrow, narrow, wide), (narrow.half(),) * 3):
        assert product_type(*mixed) == torch.float32


def test_a_second_derivative_is_refused():
    tensors = [t.requires_grad_() for t in inputs((1, 1, 1), heads=1, length=5)]
    y, _ = triton_scan(*tensors, None, 64, plan())
    (grad,) = torch.autograd.grad(y.pow(2).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(("head", "state", "dtype"), [(5, 16, torch.float32), (16, 6, torch.float32), (16, 16, None)])
def test_other_widths_and_fp64_take_the_torch_code(head, state, dtype, monkeypatch):
    monkeypatch.setattr(op, "triton_scan", None)
    tensors = [t.to(dtype or torch.float64) for t in inputs((1, 1, 2), heads=2, length=9, head=head, state=state)]
    y, _ = ssd_scan(*tensors[:6], initial_state=tensors[6])
    expected, _ = ssd_scan_reference(*(t.double() for t in tensors[:6]), initial_state=tensors[6].double())
    assert y.dtype == tensors[0].dtype and relative_error(y, expected) < 1e-6


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("head", "state"), [(16, 16), (5, 6), (40, 64)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_updates_the_state_in_place(layout, head, state, skip, triton_alone):
    x, dt, a, b, c, d, before = inputs(layout, rows=3, length=1, head=head, state=state)
    d = d if skip else None
    cache = poisoned(3, 8, head, state)[:, ::2]  # heads of another state lie between them
    cache.copy_(before)
    given = (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0])
    y = ssd_step(*given, cache, d)
    wide = [None if t is None else t.double() for t in (*given, before, d)]
    expected, after = ssd_step_reference(*wide)
    assert relative_error(y, expected) < 1e-6 and relative_error(cache, after) < 1e-6


def test_steps_continue_a_scan(triton_alone):
    x, dt, a, b, c, d, state = inputs((2, 2, 4), length=9)
    y, _ = ssd_scan(x, dt, a, b, c, d, initial_state=state)
    _, carried = ssd_scan(x[:, :5], dt[:, :5], a, b[:, :5], c[:, :5], d, initial_state=state)
    steps = [ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], carried, d) for t in range(5, 9)]
    assert relative_error(torch.stack(steps, 1), y[:, 5:]) < 1e-6


def test_a_state_with_gaps_in_its_last_dimension_takes_the_torch_code():
    x, dt, a, b, c, d, before = inputs((2, 2, 4), length=1)
    state = randn(1, 4, 16, 32, seed=1)[..., ::2]
    state.copy_(before)
    given = (x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0])
    expected, after = ssd_step_reference(*given, before, d)
    y = ssd_step(*given, state, d)
    assert relative_error(y, expected) < 1e-6 and relative_error(state, after) < 1e-6
