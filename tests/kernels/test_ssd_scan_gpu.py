"""The Triton scan on a CUDA device against torch's chunks in fp64: types, widths, every tile, memory, graphs, bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_cases import relative_error, requires_cuda
from posttrain_kernels.ssd_scan import ssd_scan, ssd_step, ssd_step_reference
from posttrain_kernels.ssd_scan.tiles import BACKWARD_IN_LESS, FORWARD_IN_LESS, Plan, Tile, candidates, choose_plan
from posttrain_kernels.ssd_scan.torch_scan import chunked_scan
from posttrain_kernels.ssd_scan.triton_scan import triton_scan
from ssd_scan_cases import documents, inputs, judge
from torch import Tensor

pytestmark = [pytest.mark.gpu, requires_cuda]

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Of operands, accumulated in fp32; a's gradient, a sum that may all but cancel, has five times as much."""
LAYOUTS = [(8, 8, 8), (2, 2, 8), (8, 1, 1)]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def compare(tensors: list[Tensor], ids: Tensor | None = None, **options: object) -> tuple[Tensor, ...]:
    limit = TOLERANCE[tensors[0].dtype]
    ids = None if ids is None else ids.cuda()
    return judge(chunked_scan_in_order, on_gpu(tensors), ids, limit, of_a=5 * limit, **options)


def chunked_scan_in_order(*tensors: Tensor, initial_state: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    return chunked_scan(*tensors, initial_state, documents)


def runnable(run: Callable[[], object]) -> object:
    """What it returns; skipped where the device has too little shared memory for the tile, which then is never used."""
    from triton.runtime.errors import OutOfResources

    try:
        return run()
    except OutOfResources as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("seed", range(16))
def test_random_cases(seed, poison_empty):
    draw = random.Random(seed)
    length = draw.choice([1, 17, 63, 65, 200, draw.randint(2, 900), *(64 * draw.randint(1, 14) for _ in range(6))])
    sizes = dict(rows=draw.choice([1, 3]), length=length, heads=8, head=draw.choice([16, 32, 64, 128]))
    tensors = inputs(
        draw.choice(LAYOUTS),
        **sizes,
        state=draw.choice([16, 32, 64, 128]),
        dtype=draw.choice([torch.bfloat16, torch.bfloat16, torch.float16, torch.float32]),
        seed=seed,
        decay=draw.choice([1e-3, 0.05, 1.0]),
    )
    starts = sorted(draw.sample(range(1, length), min(4, length - 1)))
    ids = documents(sizes["rows"], length, *starts) if length > 4 and draw.random() < 0.6 else None
    compare(tensors, ids, chunk=draw.choice([16, 64, 64, 128]))


@pytest.mark.parametrize("length", [777, 768])  # the copy engine carries whole chunks alone
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("segment", "run"), [(None, None), (None, 256), (128, None), (256, 128)])
def test_rows_in_segments_and_runs(segment, run, dtype, length, poison_empty):
    tensors = inputs((2, 2, 8), length=length, heads=8, head=64, state=64, dtype=dtype, decay=0.01)
    chosen = choose_plan(8, length, 64, 64, 2 if dtype == torch.bfloat16 else 4, 64)
    plan = replace(chosen, segment=segment, run=run)
    compare(tensors, documents(1, length, 256, 300), plan=plan)


@pytest.mark.parametrize(("head", "state"), [(64, 64), (16, 16), (32, 64), (64, 16)])
def test_slices_of_one_projection_through_the_copy_engine(head, state, poison_empty):
    tensors = inputs((2, 2, 8), rows=2, length=192, heads=8, head=head, state=state, dtype=torch.bfloat16, decay=0.05)
    packed = torch.cat([tensors[place].flatten(2) for place in (0, 3, 4)], -1)
    parts = packed.split([2 * head, 2 * state, 8 * state], -1)
    for place, part, width in zip((0, 3, 4), parts, (head, state, state), strict=True):
        tensors[place] = part.unflatten(2, (-1, width))
    chosen = choose_plan(16, 192, head, state, 2, 64)
    forward, backward = (replace(tile, tma=True, tma_out=True) for tile in (chosen.forward, chosen.backward))
    compare(tensors, plan=replace(chosen, forward=forward, backward=backward))


@pytest.mark.parametrize("length", [256, 250])
@pytest.mark.parametrize(("head", "state"), [(32, 32), (64, 32), (32, 64), (64, 128), (128, 64), (32, 128), (128, 32)])
def test_the_chosen_tiles_of_mixed_widths(head, state, length, poison_empty):
    """As launch shapes are chosen: what is carried by the copy engine differs from width to width."""
    tensors = inputs(
        (2, 2, 8), rows=2, length=length, heads=8, head=head, state=state, dtype=torch.bfloat16, decay=0.05
    )
    compare(tensors, documents(2, length, 70, 128))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strong_decays_among_weak_ones(dtype, poison_empty):
    tensors = inputs((2, 2, 8), length=300, heads=8, head=64, state=64, dtype=dtype)
    tensors[1] = torch.full_like(tensors[1], 1e-3)
    tensors[1][:, 20:45] = 1.25
    tensors[1][:, 130] = 40.0
    tensors[2] = torch.full_like(tensors[2], -16.0)
    found = compare(tensors)
    assert all(tensor.isfinite().all() for tensor in found)


WIDTHS = [(64, 64), (128, 128)]


def tiles(of: str) -> list[tuple[tuple[int, int], Tile, torch.dtype]]:
    """Widths, tile and type of everything that may be chosen for a pass at widths of 64 and 128."""
    cases = [(width, torch.bfloat16) for width in WIDTHS] + [((64, 64), torch.float32)]
    found = [(width, tile, dtype) for width, dtype in cases for tile in candidates(*width, dtype.itemsize)[of]]
    less = {"forward": [FORWARD_IN_LESS], "backward": BACKWARD_IN_LESS.values()}.get(of, [])
    return found + [
        ((128, 128), tile, torch.bfloat16) for tile in less if ((128, 128), tile, torch.bfloat16) not in found
    ]


def tile_name(value: object) -> str:
    if isinstance(value, Tile):
        return f"L{value.chunk}-P{value.width}-w{value.warps}-s{value.stages}" + "-tma" * (value.tma + value.tma_out)
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def tile_inputs(width: tuple[int, int], dtype: torch.dtype, tile: Tile) -> list[Tensor]:
    """The copy engine carries whole chunks alone."""
    length = 320 if tile.tma else 333
    return inputs((2, 2, 4), rows=2, length=length, heads=4, head=width[0], state=width[1], dtype=dtype, decay=0.05)


@pytest.mark.parametrize(("width", "tile", "dtype"), tiles("forward"), ids=tile_name)
def test_every_forward_tile_that_tuning_may_choose(width, tile, dtype, poison_empty):
    """Compilers have miscompiled some tile sizes on this architecture: each is compared."""
    from posttrain_kernels.ssd_scan.launch import Scan, scan_forward

    tensors, limit = on_gpu(tile_inputs(width, dtype, tile)), TOLERANCE[dtype]
    plan = replace(choose_plan(8, 333, *width, dtype.itemsize, 64), forward=tile)
    scan = Scan.of(*tensors[:6], None, 64, plan)
    y, last, _ = runnable(lambda: scan_forward(scan, tensors[6]))
    expected, end = chunked_scan(*(tensor.double() for tensor in tensors), None)
    assert relative_error(y, expected) < limit and relative_error(last, end) < limit


@pytest.mark.parametrize(("width", "tile", "dtype"), tiles("states"), ids=tile_name)
def test_every_tile_of_states_that_tuning_may_choose(width, tile, dtype, poison_empty):
    """States before and gradients after every chunk, both ways in one launch."""
    from posttrain_kernels.ssd_scan.launch import Scan, chunk_states, sum_decays

    tensors, limit = on_gpu(tile_inputs(width, dtype, tile)), TOLERANCE[dtype]
    plan = Plan(tile, tile, Tile(tile.chunk, width[0], 8, 1), run=tile.chunk)
    scan = Scan.of(*tensors[:6], None, 64, plan)
    grad_y, grad_last = torch.randn_like(tensors[0][:, :, :1].expand(-1, -1, 4, -1)), torch.randn_like(tensors[6])
    decays = sum_decays(scan, tile.chunk)
    before, after, grad_first = runnable(lambda: chunk_states(scan, decays, tensors[6], grad_y, grad_last))
    x, dt, a, b, c, d, state = (tensor.double() for tensor in tensors)
    for chunk in range(before.shape[2]):
        state = state.detach().requires_grad_()
        assert relative_error(before[:, :, chunk], state) < limit, chunk
        rest = slice(chunk * tile.chunk, None)
        outputs = chunked_scan(x[:, rest], dt[:, rest], a, b[:, rest], c[:, rest], d, state, None)
        (grad,) = torch.autograd.grad(outputs, state, (grad_y[:, rest].double(), grad_last.double()))
        found = grad_first if chunk == 0 else after[:, :, chunk - 1]
        assert relative_error(found, grad) < limit, chunk
        part = slice(chunk * tile.chunk, (chunk + 1) * tile.chunk)
        _, state = chunked_scan(x[:, part], dt[:, part], a, b[:, part], c[:, part], d, state, None)
    assert relative_error(after[:, :, -1], grad_last) < limit


@pytest.mark.parametrize(("width", "tile", "dtype"), tiles("backward"), ids=tile_name)
def test_every_backward_tile_that_tuning_may_choose(width, tile, dtype, poison_empty):
    chosen = choose_plan(8, 333, *width, dtype.itemsize, 64)
    plan = Plan(chosen.forward, replace(chosen.states, chunk=tile.chunk), tile)
    tensors, ids = tile_inputs(width, dtype, tile), documents(2, 320 if tile.tma else 333, 64, 100)
    first = runnable(lambda: compare(tensors, ids, plan=plan))
    second = compare(tensors, ids, plan=plan)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # a race would show
    compare(tensors, ids, plan=replace(plan, run=128))


@pytest.mark.parametrize("head", [64, 128])
def test_fp32_inputs_under_autocast_have_bf16_products_and_gradients_of_their_types(head, poison_empty):
    tensors = on_gpu(inputs((2, 2, 4), length=300, heads=4, head=head, state=head, decay=0.05))
    with torch.autocast("cuda", torch.bfloat16):
        found = judge(
            chunked_scan_in_order, tensors, None, TOLERANCE[torch.bfloat16], of_a=5e-2, operands=torch.bfloat16
        )
        y, _ = ssd_scan(*tensors[:6], initial_state=tensors[6])
    exact, _ = ssd_scan(*tensors[:6], initial_state=tensors[6])
    assert torch.equal(found[0], y) and 1e-4 < relative_error(y, exact)
    assert found[1].dtype == torch.float32


def test_memory_of_a_step_is_inputs_gradients_states_and_decays():
    # Enough rows and heads for a program each: states between segments and before runs would be there, too.
    tensors = on_gpu(inputs((32, 32, 32), rows=8, length=512, heads=32, head=64, state=64, dtype=torch.bfloat16))
    plan = choose_plan(8 * 32, 512, 64, 64, 2, 64)
    chunk = plan.states.chunk
    assert plan.segment is None and plan.run is None
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def step():
        y, _ = ssd_scan(*leaves[:6], initial_state=leaves[6])
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, last = ssd_scan(*leaves[:6], initial_state=leaves[6])
    held = torch.cuda.memory_allocated() - before
    assert held <= y.nbytes + last.nbytes + 2**20, "something of the forward pass is kept beside its outputs"
    del y, last
    step()
    # y and its gradient, three gradients, all of x's size; states, as large as 64 tokens, of every chunk; decays, 16
    # bytes for a token's and head's 128; and small ones.
    most = (5.25 + 64 / chunk + 16 / 128) * leaves[0].nbytes + 4 * leaves[6].nbytes
    assert torch.cuda.max_memory_allocated() - before < most


def captured(run):
    """A graph of `run`, and what it returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize(("length", "dtype"), [(300, torch.float32), (320, torch.bfloat16)], ids=str)
def test_a_captured_training_step_replays_on_new_inputs(length, dtype):
    sizes = dict(length=length, heads=8, head=64, state=64, dtype=dtype, decay=0.1)
    old, new = (on_gpu(inputs((2, 2, 8), seed=seed, **sizes)) for seed in (0, 1))
    leaves = [tensor.clone().requires_grad_() for tensor in old]

    def step():
        y, last = triton_scan(*leaves, None, 64)
        return y, last, *torch.autograd.grad(y.square().sum() + last.sum(), leaves)

    graph, out = captured(step)
    with torch.no_grad():
        for leaf, tensor in zip(leaves, new, strict=True):
            leaf.copy_(tensor)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(out, step(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_captured_steps_follow_a_state(dtype):
    x, dt, a, b, c, d, state = on_gpu(inputs((2, 2, 8), rows=5, length=6, heads=8, head=64, state=64, dtype=dtype))
    token = [tensor[:, 0].clone() for tensor in (x, dt, b, c)]
    cache, expected = state.clone(), state.double()
    graph, y = captured(lambda: ssd_step(token[0], token[1], a, token[2], token[3], cache, d))
    cache.copy_(state)
    for step in range(6):
        for place, tensor in zip(token, (x, dt, b, c), strict=True):
            place.copy_(tensor[:, step])
        y.fill_(float("nan"))
        graph.replay()
        given = (tensor[:, step].double() for tensor in (x, dt))
        after = (tensor[:, step].double() for tensor in (b, c))
        wanted, expected = ssd_step_reference(*given, a.double(), *after, expected, d.double())
        error = relative_error(y, wanted)
        assert error < (3e-3 if dtype == torch.bfloat16 else 1e-6), error
        assert relative_error(cache, expected) < 1e-6
