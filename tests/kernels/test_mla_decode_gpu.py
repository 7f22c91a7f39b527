"""`mla_decode` on a GPU: bf16 no worse than eager bf16 against fp64, every tile, layouts, and a captured graph."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error, requires_cuda
from posttrain_kernels.mla_decode import mla_decode, mla_decode_reference

pytestmark = [pytest.mark.gpu, requires_cuda]

TIMES_EAGER = 1.5
SHAPES = [(16, 512, 64), (32, 512, 64), (128, 512, 64), (16, 128, 32), (32, 128, 32), (128, 128, 32)]
SHAPES += [(9, 192, 32), (15, 160, 16), (9, 96, 48), (3, 32, 16), (40, 256, 64), (20, 384, 64)]
SHAPES += [(70, 512, 128), (130, 128, 64), (64, 272, 16)]
"""Query heads, r, d_r: the sizes of the target, SmolLM2's, and widths that are no powers of two or need more memory."""


def bf16(*shape, seed):
    return randn(*shape, seed=seed, dtype=torch.bfloat16).cuda()


def arguments(heads, rank, rope, length, starts, seed=0, gap=40):
    """Caches with two rows beyond the batch, NaN in front of each row's start and from its length on."""
    start, slots = torch.tensor(starts).cuda(), torch.arange(length + gap).cuda()
    outside = torch.ones(len(starts) + 2, length + gap, 1, dtype=torch.bool, device="cuda")
    outside[: len(starts)] = ~((slots >= start[:, None]) & (slots < length))[..., None]
    latent, k_rope = (
        bf16(len(starts) + 2, length + gap, width, seed=seed + width).masked_fill_(outside, float("nan"))
        for width in (rank, rope)
    )
    q_latent, q_rope = (bf16(len(starts), heads, width, seed=seed + 1000 + width) for width in (rank, rope))
    return q_latent, q_rope, latent, k_rope, start, torch.tensor([length]).cuda(), 1.5 * (rank + rope) ** -0.5


def wide(given):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]


def eager(q_latent, q_rope, latent, k_rope, start, length, scale):
    """As a model computes it: products in bf16, softmax in fp32, weights back in bf16."""
    rows, slots = q_latent.shape[0], torch.arange(latent.shape[1], device="cuda")
    seen = ((slots >= start[:, None]) & (slots < length))[:, None]
    latent, k_rope = latent[:rows].nan_to_num(), k_rope[:rows].nan_to_num()
    scores = (q_latent @ latent.transpose(1, 2) + q_rope @ k_rope.transpose(1, 2)) * scale
    scores = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
    return scores.softmax(-1).masked_fill(~seen, 0).to(latent.dtype) @ latent


def judge(out, given):
    """The kernel's error within 1.5 times eager's; exact zeros for rows without slots."""
    exact = mla_decode_reference(*wide(given))
    floor = torch.finfo(torch.bfloat16).eps / 8
    assert relative_error(out, exact) <= max(TIMES_EAGER * relative_error(eager(*given), exact), floor)
    assert not out[given[4] >= given[5]].any()


@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize("length", [1, 63, 100, 2000])
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES)
def test_shapes_and_lengths(heads, rank, rope, length, splits):
    starts = [0, length // 3, length - 1, length, length + 7]
    given = arguments(heads, rank, rope, length, starts)
    judge(mla_decode(*given, splits=splits), given)


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES[:3])
def test_batches(heads, rank, rope, rows):
    given = arguments(heads, rank, rope, 700, [(37 * row) % 710 for row in range(rows)], seed=rows)
    judge(mla_decode(*given), given)


def tiles():
    """Every tile that tuning may choose, by shape."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from tune_mla_decode import candidates

    for heads, rank, rope in (*SHAPES[:6], (9, 192, 32)):
        for tile in dict.fromkeys(candidates(heads, rank, rope)):
            yield pytest.param(heads, rank, rope, tile, id=f"H{heads}-r{rank}-{tile}")


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "rank", "rope", "tile"), tiles() if torch.cuda.is_available() else [])
def test_every_tile_that_tuning_may_choose(heads, rank, rope, tile):
    """Compilers have miscompiled some tile sizes of transposed products on this architecture: each is compared."""
    from posttrain_kernels.mla_decode.launch import mla_decode_triton
    from triton.runtime.errors import OutOfResources

    given = arguments(heads, rank, rope, 333, [0, 1, 200, 270, 300, 333])
    try:
        judge(mla_decode_triton(*given, splits=2, tile=tile), given)
    except OutOfResources as error:
        pytest.skip(f"does not fit: {error}")


@pytest.mark.parametrize("scale", [-0.06, 0.0])
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES[2:6])
def test_scales_that_are_not_positive(heads, rank, rope, scale):
    given = (*arguments(heads, rank, rope, 200, [0, 150, 199, 200])[:-1], scale)
    judge(mla_decode(*given), given)


def test_slots_in_front_of_rows():
    """Caches [S, B, d], both in one buffer: strides that the copy engine cannot take as one matrix."""
    q_latent, q_rope, latent, k_rope, *rest = arguments(16, 512, 64, 100, [0, 40, 99, 100])
    both = torch.cat((latent, k_rope), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    query = torch.cat((q_rope, q_latent), dim=-1)
    given = (query[..., 64:], query[..., :64], both[..., :512], both[..., 512:], *rest)
    judge(mla_decode(*given), given)


def test_more_than_32_bits_of_elements():
    """64 rows of 70,000 slots of 512: 2.3e9 elements; the last row alone is looked at."""
    capacity, rank, rope = 70_000, 512, 64
    latent = torch.empty(64, capacity, rank, device="cuda", dtype=torch.bfloat16)
    k_rope = torch.empty(64, capacity, rope, device="cuda", dtype=torch.bfloat16)
    latent.fill_(float("nan"))
    k_rope.fill_(float("nan"))
    latent[-1, -300:], k_rope[-1, -300:] = bf16(300, rank, seed=1), bf16(300, rope, seed=2)
    start = torch.full((64,), capacity, device="cuda")
    start[-1] = capacity - 300
    q_latent, q_rope = bf16(64, 16, rank, seed=3), bf16(64, 16, rope, seed=4)
    length = torch.tensor([capacity], device="cuda")
    out = mla_decode(q_latent, q_rope, latent, k_rope, start, length, 0.05)
    last = (q_latent[-1:], q_rope[-1:], latent[-1:, -300:], k_rope[-1:, -300:])
    last = (*last, torch.zeros_like(start[-1:]), torch.tensor([300], device="cuda"), 0.05)
    assert relative_error(out[-1:], mla_decode_reference(*wide(last))) < 1e-2
    assert not out[:-1].any()


def test_fp32_and_fp64():
    given = arguments(9, 96, 48, 100, [0, 30, 99, 100])
    exact = mla_decode_reference(*wide(given))
    assert torch.equal(mla_decode(*wide(given)), exact)
    single = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given]
    assert relative_error(mla_decode(*single), exact) < 1e-5


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("heads", [9, 128])
def test_a_captured_graph_follows_starts_and_length(heads, splits):
    given = list(arguments(heads, 512, 64, 300, [0, 150, 299], gap=0))
    full = [cache.nan_to_num() for cache in given[2:4]]
    start, length = given[4], given[5]
    mla_decode(*given, splits=splits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mla_decode(*given, splits=splits)
    for step, (new, starts) in enumerate([(300, [0, 150, 299]), (77, [1, 70, 77]), (5, [0, 5, 4])]):
        start.copy_(torch.tensor(starts))
        length.fill_(new)
        slots = torch.arange(300, device="cuda")
        outside = torch.ones(5, 300, 1, dtype=torch.bool, device="cuda")
        outside[:3] = ~((slots >= start[:, None]) & (slots < length))[..., None]
        for cache, values in zip(given[2:4], full, strict=True):
            cache.copy_(values + step).masked_fill_(outside, float("nan"))
        captured.fill_(float("nan"))
        graph.replay()
        judge(captured, given)


@pytest.mark.parametrize("splits", [1, 7])
@pytest.mark.parametrize(("heads", "rank", "rope"), SHAPES[:6])
def test_a_call_waits_for_the_one_before_it(heads, rank, rope, splits):
    """Kernels are launched before their predecessors end: a chain in one graph, and the same one call at a time."""
    q_latent, q_rope, *rest = arguments(heads, rank, rope, 900, [0, 300, 899])

    def chain(after_each):
        query, results = q_latent, []
        for _ in range(6):
            query = mla_decode(query, q_rope, *rest, splits=splits)
            after_each()
            results.append(query)
        return results

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(lambda: None)
    for _ in range(3):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
