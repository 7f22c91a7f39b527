"""The operators of decoding on a GPU: bf16 no worse than eager bf16 against fp64, and replays of a captured graph."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error, requires_cuda
from posttrain_kernels.decode_attention import decode_attention, decode_attention_reference
from posttrain_kernels.decode_attention.launch import decode_attention_triton
from posttrain_kernels.decode_attention.tiles import Tile
from posttrain_kernels.mamba_step import conv_step, conv_step_reference, gated_norm, gated_norm_reference
from posttrain_kernels.rms_norm import rms_norm, rms_norm_reference
from posttrain_kernels.rotary_cache import (
    latent_cache,
    latent_cache_reference,
    rotary_cache,
    rotary_cache_reference,
    rotate,
    rotate_reference,
)
from posttrain_kernels.ssd_scan import ssd_step
from posttrain_kernels.swiglu import silu_mul, silu_mul_reference

pytestmark = [pytest.mark.gpu, requires_cuda]

CASES = 50
TIMES_EAGER = 1.5


def bf16(*shape, seed, scale=1.0):
    return randn(*shape, seed=seed, scale=scale, dtype=torch.bfloat16).cuda()


def pick(seed, *choices):
    """One of each list, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return [options[int(torch.randint(len(options), (1,), generator=generator))] for options in choices]


def wide(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def judge(out, eager, exact):
    """The kernel's error within 1.5 times eager's, or below half of what rounding the output alone costs."""
    floor = torch.finfo(torch.bfloat16).eps / 8
    assert relative_error(out, exact) <= max(TIMES_EAGER * relative_error(eager, exact), floor)


@pytest.mark.parametrize("seed", range(CASES))
def test_rms_norm(seed):
    rows, width = pick(seed, [1, 3, 64, 257, 3000], [17, 64, 192, 576, 2048, 4096])
    x, weight = bf16(rows, width, seed=seed), bf16(width, seed=seed + 100)
    residual = bf16(rows, width, seed=seed + 200, scale=5.0) if seed % 3 else None
    given = (x, weight, 1e-5, residual)
    outcomes = rms_norm(*given), rms_norm_reference(*given), rms_norm_reference(*wide(given))
    for out, eager, exact in zip(*outcomes, strict=True):
        judge(out, eager, exact)


@pytest.mark.parametrize("seed", range(CASES))
def test_silu_mul(seed):
    rows, width = pick(seed, [1, 3, 64, 257], [17, 96, 513, 1536, 8192])
    gate_up = bf16(rows, 2 * width, seed=seed, scale=3.0)
    judge(silu_mul(gate_up), silu_mul_reference(gate_up), silu_mul_reference(gate_up.double()))


@pytest.mark.parametrize("seed", range(CASES))
def test_conv_step(seed):
    rows, width, kernel, repeats = pick(seed, [1, 5, 64], [24, 64, 128], [1, 4, 6], [1, 3])
    heads = (6, 6, 9)
    channels, own = 21 * width, (12 // repeats + 9) * width
    drive = bf16(rows, own + 40, seed=seed)[:, 16 : 16 + own]
    taps, bias = bf16(channels, kernel, seed=seed + 1), bf16(channels, seed=seed + 2)
    norms = [bf16(width, seed=seed + 3), bf16(width, seed=seed + 4)] if seed % 2 else [None, None]
    outcomes = []
    for operator, widen in ((conv_step, list), (conv_step_reference, list), (conv_step_reference, wide)):
        columns, *given = widen([bf16(rows + 1, channels, kernel, seed=seed + 5), drive, taps, bias, *norms])
        options = dict(repeats=repeats, silu=seed % 3 > 0, b_norm=given[3], c_norm=given[4], eps=1e-5)
        found = [operator(given[0] * (1 + token), columns, *given[1:3], heads, **options) for token in range(3)]
        outcomes.append((torch.stack(found), columns))
    judge(*(outcome[0] for outcome in outcomes))
    assert torch.equal(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize("seed", range(CASES))
def test_gated_norm(seed):
    rows, width, heads = pick(seed, [1, 5, 64, 257], [24, 64, 128], [1, 9, 32])
    y, z = bf16(rows, heads * width, seed=seed), bf16(rows, heads * width + 30, seed=seed + 1)[:, 10:-20]
    given = (y, z, bf16(heads * width, seed=seed + 2) if seed % 4 else None, 1e-5, width)
    judge(gated_norm(*given), gated_norm_reference(*given), gated_norm_reference(*wide(given)))


@pytest.mark.parametrize("seed", range(CASES))
def test_a_step_of_the_scan_takes_step_sizes_as_the_projection_gives_them(seed):
    rows, (heads, shared), width = pick(seed, [1, 5, 64], [(9, 3), (32, 8)], [24, 64])
    x, b = bf16(rows, shared, width, seed=seed), bf16(rows, shared, width, seed=seed + 1)
    c, dt = bf16(rows, heads, width, seed=seed + 2), bf16(rows, heads, seed=seed + 3, scale=12.0)
    a, bias, skip = (randn(heads, seed=seed + n).cuda() for n in (4, 5, 6))
    state = randn(rows, heads, width, width, seed=seed + 7).cuda()
    outcomes = []
    for widen in (list, wide):
        given = widen([x, dt, -a.exp(), b, c, state.clone(), skip])
        out = ssd_step(*given, dt_bias=widen([bias])[0], dt_softplus=True)
        outcomes.append((out, given[5]))
    assert relative_error(outcomes[0][1], outcomes[1][1]) < 1e-5
    assert relative_error(outcomes[0][0], outcomes[1][0]) < 4e-3


def rotary_arguments(seed, rows, width, capacity=40):
    tables = [bf16(90, width, seed=seed + 100 + n) for n in range(2)]
    positions = torch.randint(0, 90, (rows,), generator=torch.Generator().manual_seed(seed)).cuda()
    return [*tables, positions, torch.tensor(seed % capacity).cuda()]


@pytest.mark.parametrize("seed", range(CASES))
def test_rotary_cache(seed):
    rows, (heads, shared), width = pick(seed, [1, 5, 64], [(9, 3), (32, 8), (4, 4)], [24, 64, 128])
    qkv = bf16(rows, (heads + 2 * shared) * width, seed=seed)
    norms = [bf16(width, seed=seed + 1), bf16(width, seed=seed + 2), 1e-6] if seed % 2 else []
    shared_arguments = rotary_arguments(seed, rows, width)
    outcomes = []
    for operator, widen in ((rotary_cache, list), (rotary_cache_reference, list), (rotary_cache_reference, wide)):
        caches = [torch.full((rows + 1, shared, 40, width), float("nan"), device="cuda", dtype=qkv.dtype) for _ in "kv"]
        caches = widen(caches)
        query = operator(*widen([qkv, *shared_arguments]), *caches, *widen(norms))
        assert all(int((~cache.isnan()).sum()) == rows * shared * width for cache in caches)
        outcomes.append((query, *(cache[:rows, :, seed % 40] for cache in caches)))
    for out, eager, exact in zip(*outcomes, strict=True):
        judge(out, eager, exact)
    assert torch.equal(outcomes[0][2], outcomes[1][2])


@pytest.mark.parametrize("seed", range(CASES))
def test_latent_cache_and_rotate(seed):
    rows, rank, width, heads = pick(seed, [8, 17, 64], [16, 160, 192, 512], [8, 24, 64], [1, 9, 32])
    kv_a, norm = bf16(rows, rank + width, seed=seed), [bf16(rank, seed=seed + 1)] if seed % 2 else []
    query = bf16(rows, heads, 40 + width, seed=seed + 3)[..., 40:]
    shared_arguments = rotary_arguments(seed, rows, width)
    outcomes = []
    for cached, turned, widen in (
        (latent_cache, rotate, list),
        (latent_cache_reference, rotate_reference, list),
        (latent_cache_reference, rotate_reference, wide),
    ):
        caches = [
            torch.full((rows + 1, 1, 40, n), float("nan"), device="cuda", dtype=kv_a.dtype) for n in (rank, width)
        ]
        caches = widen(caches)
        cached(*widen([kv_a, *shared_arguments]), *caches, *widen(norm))
        assert [int((~cache.isnan()).sum()) for cache in caches] == [rows * rank, rows * width]
        outcomes.append(
            (*(cache[:rows, :, seed % 40] for cache in caches), turned(*widen([query, *shared_arguments[:3]])))
        )
    for out, eager, exact in zip(*outcomes, strict=True):
        judge(out, eager, exact)


def eager_attention(q, keys, values, start, length, scale, q_rope=None, k_rope=None):
    """As the model computes it: products in bf16, softmax in fp32, weights back in bf16."""
    rows, shared = q.shape[0], keys.shape[1]
    keys, values = keys[:rows].nan_to_num(), values[:rows].nan_to_num()
    slots = torch.arange(keys.shape[2], device=q.device)
    seen = ((slots >= start[:, None]) & (slots < length))[:, None, None]
    scores = q.unflatten(1, (shared, -1)) @ keys.transpose(2, 3)
    if q_rope is not None:
        scores = scores + q_rope.unflatten(1, (shared, -1)) @ k_rope[:rows].nan_to_num().transpose(2, 3)
    scores = (scores * scale).float().masked_fill(~seen, torch.finfo(torch.float32).min)
    return (scores.softmax(-1).masked_fill(~seen, 0).to(q.dtype) @ values).flatten(1, 2)


def attention_arguments(seed, rows, heads, shared, width, value_width, capacity, rope=0):
    generator = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, capacity + 1, (1,), generator=generator))
    start = torch.randint(0, length + 1, (rows,), generator=generator).cuda()
    slots = torch.arange(capacity, device="cuda")
    out_of_range = ~((slots >= start[:, None]) & (slots < length))[:, None, :, None]

    def cache(columns, offset):
        full = bf16(rows + 1, shared, capacity, columns, seed=seed + offset)
        full[:rows].masked_fill_(out_of_range, float("nan"))
        return full

    keys = cache(width, 1)
    given = [bf16(rows, heads, width, seed=seed + 3), keys, cache(value_width, 2) if value_width else keys, start]
    given += [torch.tensor(length).cuda(), (width + rope) ** -0.5]
    return given + ([bf16(rows, heads, rope, seed=seed + 4), cache(rope, 5)] if rope else [])


def judge_attention(given, **options):
    out = decode_attention(*given, **options)
    judge(out, eager_attention(*given), decode_attention_reference(*wide(given)))
    empty = given[3] >= given[4]
    assert not out[empty].any()


GROUPED = [(9, 3, 64), (32, 8, 64), (14, 2, 128), (4, 4, 16), (7, 1, 80), (40, 1, 24)]
"""Query heads, key/value heads, width: few enough that compiling them takes a minute."""
LATENT = [(9, 192, 32), (32, 512, 64), (1, 16, 8), (40, 160, 24), (9, 48, 16)]
"""Heads, r, d_r."""


@pytest.mark.parametrize("seed", range(CASES))
def test_grouped_attention(seed):
    rows, (heads, shared, width), capacity, splits = pick(seed, [1, 3, 64], GROUPED, [5, 130, 700], [None, 1, 5])
    value_width = 96 if seed % 10 == 0 else width
    judge_attention(attention_arguments(seed, rows, heads, shared, width, value_width, capacity), splits=splits)


@pytest.mark.parametrize("seed", range(CASES))
def test_latent_attention(seed):
    rows, (heads, rank, rope), capacity, splits = pick(seed, [1, 3, 64], LATENT, [5, 130, 700], [None, 1, 5])
    judge_attention(attention_arguments(seed, rows, heads, 1, rank, 0, capacity, rope), splits=splits)


TUNABLE = [(True, slots, stages) for slots in (16, 32, 64, 128) for stages in (1, 2, 3, 4)]
TUNABLE += [(False, slots, stages) for slots in (16, 32) for stages in (1, 2)]


@pytest.mark.parametrize(("dot", "slots", "stages"), TUNABLE)
def test_every_tile_that_tuning_may_choose(dot, slots, stages):
    """Compilers have miscompiled some tile sizes of transposed products on this architecture: each is compared."""
    given = attention_arguments(slots + stages, 5, 9, 3, 64, 64, 300)
    tile = Tile(dot=dot, heads=16 if dot else 4, slots=slots, warps=4, stages=stages)
    out = decode_attention_triton(*given, None, None, splits=1, tile=tile)
    judge(out, eager_attention(*given), decode_attention_reference(*wide(given)))


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("slots", [16, 32])
@pytest.mark.parametrize("rank", [192, 512])
def test_every_latent_tile_that_tuning_may_choose(rank, slots, warps, stages):
    given = attention_arguments(rank + slots, 5, 9, 1, rank, 0, 300, 32)
    tile = Tile(dot=True, heads=16, slots=slots, warps=warps, stages=stages)
    out = decode_attention_triton(*given, splits=1, tile=tile)
    judge(out, eager_attention(*given), decode_attention_reference(*wide(given)))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_captured_step_follows_slot_positions_and_starts(splits):
    """One graph of rotation, cache write, attention, norm and gate, replayed token by token."""
    rows, heads, shared, width, capacity = 5, 6, 2, 64, 70
    steps = [bf16(rows, (heads + 2 * shared) * width, seed=n) for n in range(6)]
    tables, qkv = [bf16(90, width, seed=50 + n) for n in range(2)], torch.zeros_like(steps[0])
    start, slot = torch.tensor([60, 60, 61, 62, 69], device="cuda"), torch.tensor(60, device="cuda")
    positions, weight = torch.zeros(rows, dtype=torch.long, device="cuda"), bf16(heads * width, seed=7)
    caches = [
        torch.full((rows + 2, shared, capacity, width), float("nan"), device="cuda", dtype=qkv.dtype) for _ in "kv"
    ]
    mirrors = [cache.clone() for cache in caches]

    def step(rotary, attend, norm, gate, keys, values, **options):
        query = rotary(qkv, *tables, positions, slot, keys, values)
        out = attend(query, keys, values, start, slot + 1, 0.125, **options).flatten(1)
        return gate(norm(out, weight, 1e-5, out)[0])

    ours = (rotary_cache, decode_attention, rms_norm, silu_mul, *caches)
    theirs = (rotary_cache_reference, decode_attention_reference, rms_norm_reference, silu_mul_reference, *mirrors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*ours, splits=splits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*ours, splits=splits)
    for index, values in enumerate(steps):
        qkv.copy_(values)
        slot.fill_(60 + index)
        positions.copy_((slot - start).clamp(min=0))
        captured.fill_(float("nan"))
        graph.replay()
        expected = step(*theirs)
        seen = (start <= slot).cpu()
        assert relative_error(captured.cpu()[seen], expected.cpu()[seen]) < 2e-2
        assert not captured.cpu()[~seen].any()
