"""The Triton rotations and cache writes against their references, fp32, on caches full of NaN."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import poisoned, randn, relative_error
from posttrain_kernels.rotary_cache import (
    latent_cache,
    latent_cache_reference,
    rotary_cache,
    rotary_cache_reference,
    rotate,
    rotate_reference,
)

pytestmark = pytest.mark.usefixtures("poison_empty")

ROWS, BATCH, CAPACITY, SLOT, POSITIONS = 3, 5, 6, 4, 11


def tables(width):
    # The halves differ on purpose: a kernel that reads one of them twice must not pass.
    return randn(POSITIONS, width, seed=10), randn(POSITIONS, width, seed=11)


def positions():
    return torch.tensor([0, 10, 7])


def strided(vector):
    """The same numbers with a stride of 2."""
    return torch.stack((vector, torch.zeros_like(vector)), dim=-1)[..., 0]


def only_slot_written(cache):
    written = ~cache.isnan()
    return bool(written[:ROWS, ..., SLOT, :].all()) and int(written.sum()) == cache[:ROWS, ..., SLOT, :].numel()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "shared", "width"), [(9, 3, 64), (2, 2, 2), (14, 2, 24), (20, 5, 10)])
def test_queries_and_caches_match_the_reference(heads, shared, width, normed):
    qkv = randn(ROWS, (heads + 2 * shared) * width, seed=0)
    norms = (randn(width, seed=1), randn(width, seed=2), 1e-5) if normed else ()
    outcomes = []
    for operator in (rotary_cache, rotary_cache_reference):
        caches = [poisoned(BATCH, shared, CAPACITY, width) for _ in range(2)]
        query = operator(qkv, *tables(width), positions(), torch.tensor(SLOT), *caches, *norms)
        assert all(only_slot_written(cache) for cache in caches)
        outcomes.append((query, *(cache[:ROWS, :, SLOT] for cache in caches)))
    for out, reference in zip(*outcomes, strict=True):
        assert relative_error(out, reference) < 1e-6


def test_caches_may_be_views_with_slots_before_heads():
    """[B, S, G, d] seen as [B, G, S, d]: the kernel goes by strides."""
    heads, shared, width = 4, 2, 8
    qkv = randn(ROWS, (heads + 2 * shared) * width, seed=0)
    keys, values = (poisoned(BATCH, CAPACITY, shared, width).transpose(1, 2) for _ in range(2))
    dense = [poisoned(BATCH, shared, CAPACITY, width) for _ in range(2)]
    rotary_cache(qkv, *tables(width), positions(), torch.tensor([SLOT]), keys, values)
    rotary_cache_reference(qkv, *tables(width), positions(), torch.tensor([SLOT]), *dense)
    for out, reference in zip((keys, values), dense, strict=True):
        assert relative_error(out[:ROWS, :, SLOT], reference[:ROWS, :, SLOT]) < 1e-6
        assert only_slot_written(out)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rank", "width", "head_axis"), [(32, 8, False), (7, 2, True), (160, 24, True)])
def test_latent_matches_the_reference(rank, width, head_axis, normed):
    kv_a = randn(ROWS, rank + width, seed=0)
    norm = (randn(rank, seed=1), 1e-5) if normed else ()
    outcomes = []
    for operator in (latent_cache, latent_cache_reference):
        caches = [poisoned(BATCH, 1, CAPACITY, size) for size in (rank, width)]
        given = caches if head_axis or operator is latent_cache_reference else [cache[:, 0] for cache in caches]
        assert operator(kv_a, *tables(width), positions(), torch.tensor(SLOT), *given, *norm) is None
        assert all(only_slot_written(cache) for cache in caches)
        outcomes.append([cache[:ROWS, 0, SLOT] for cache in caches])
    for out, reference in zip(*outcomes, strict=True):
        assert relative_error(out, reference) < 1e-6


def test_strided_positions_and_weights():
    heads, shared, width, rank = 4, 2, 8, 12
    qkv, kv_a = randn(ROWS, (heads + 2 * shared) * width, seed=0), randn(ROWS, rank + width, seed=1)
    norms, latent_norm = (randn(width, seed=2), randn(width, seed=3)), randn(rank, seed=4)
    outcomes = []
    for given in (strided, torch.clone):
        where = (*tables(width), given(positions()), torch.tensor(SLOT))
        caches = [poisoned(BATCH, shared, CAPACITY, width) for _ in range(2)]
        latents = [poisoned(BATCH, 1, CAPACITY, size) for size in (rank, width)]
        query = rotary_cache(qkv, *where, *caches, *map(given, norms), 1e-5)
        latent_cache(kv_a, *where, *latents, given(latent_norm), 1e-5)
        turned = rotate(query, *tables(width), given(positions()))
        outcomes.append((query, turned, *(cache[:ROWS, :, SLOT] for cache in (*caches, *latents))))
    assert all(torch.equal(*pair) for pair in zip(*outcomes, strict=True))


@pytest.mark.parametrize(("heads", "width"), [(9, 8), (1, 2), (17, 20)])
def test_rotate_matches_the_reference_on_a_part_of_the_query(heads, width):
    x = randn(ROWS, heads, 12 + width, seed=0)[..., 12:]
    out = rotate(x, *tables(width), positions())
    assert out.is_contiguous()
    assert relative_error(out, rotate_reference(x, *tables(width), positions())) < 1e-6
