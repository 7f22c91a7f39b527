"""The Triton decode attention against its reference, fp32: ragged and empty rows, NaN outside each row's slots."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.decode_attention import decode_attention, decode_attention_reference
from posttrain_kernels.decode_attention.launch import decode_attention_triton
from posttrain_kernels.decode_attention.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison_empty")

STARTS, LENGTH, CAPACITY = (0, 3, 36, 37, 40), 37, 41
"""A full row, a ragged one, one of a single slot, and two without slots."""


def cache(shared, width, seed):
    """[Bmax, G, S, d] with NaN wherever no row may look, two rows beyond the batch included."""
    full = randn(len(STARTS) + 2, shared, CAPACITY, width, seed=seed)
    slots = torch.arange(CAPACITY)
    start = torch.tensor([*STARTS, CAPACITY, CAPACITY])
    seen = (slots >= start[:, None]) & (slots < LENGTH)
    return full.masked_fill(~seen[:, None, :, None], float("nan"))


def arguments(heads, shared, width, value_width):
    q = randn(len(STARTS), heads, width, seed=0)
    return q, cache(shared, width, 1), cache(shared, value_width, 2), torch.tensor(STARTS), torch.tensor(LENGTH), 0.3


def judge(out, reference):
    assert relative_error(out, reference) < 2e-6
    assert not out[3:].any() and not out.isnan().any()


@pytest.mark.parametrize("splits", [None, 1, 2, 5])
@pytest.mark.parametrize(
    ("heads", "shared", "width", "value_width"), [(6, 2, 16, 16), (3, 3, 20, 24), (7, 1, 24, 18), (4, 1, 80, 96)]
)
def test_grouped_queries(heads, shared, width, value_width, splits):
    given = arguments(heads, shared, width, value_width)
    judge(decode_attention(*given, splits=splits), decode_attention_reference(*given))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("group", [1, 3, 20])
def test_both_ways_of_multiplying_and_several_blocks_of_heads(group, dot, splits):
    tile = Tile(dot=dot, heads=16 if dot else 4, slots=16, warps=4, stages=1)
    given = arguments(2 * group, 2, 16, 16)
    judge(decode_attention_triton(*given, None, None, splits=splits, tile=tile), decode_attention_reference(*given))


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(("heads", "rank", "rope", "head_axis"), [(9, 48, 8, True), (2, 160, 16, False)])
def test_latent_attention_reads_one_cache(heads, rank, rope, head_axis, splits):
    latent, k_rope = cache(1, rank, 1), cache(1, rope, 2)
    q, q_rope = randn(len(STARTS), heads, rank, seed=0), randn(len(STARTS), heads, rope, seed=3)
    rest = (torch.tensor(STARTS), torch.tensor(LENGTH), 0.2, q_rope)
    reference = decode_attention_reference(q, latent, latent, *rest, k_rope)
    if not head_axis:
        latent, k_rope = latent[:, 0], k_rope[:, 0]
    judge(decode_attention(q, latent, latent, *rest, k_rope, splits=splits), reference)


def test_strided_caches_and_queries():
    """Caches [B, S, G, d] seen as [B, G, S, d], both in one buffer; the query is a part of a projection."""
    shared, width = 2, 16
    both = torch.cat((cache(shared, width, 1), cache(shared, width, 2)), dim=-1).transpose(1, 2).contiguous()
    keys, values = both.transpose(1, 2).split(width, dim=-1)
    q = randn(len(STARTS), 10, width, seed=0)[:, :6]
    given = (q, keys, values, torch.tensor(STARTS), torch.tensor([LENGTH]), 0.3)
    judge(decode_attention(*given, splits=2), decode_attention_reference(*given))
    judge(decode_attention(*given), decode_attention_reference(*given))


def test_strided_starts():
    q, keys, values, start, *rest = arguments(6, 2, 16, 16)
    strided = torch.stack((start, torch.zeros_like(start)), dim=1)[:, 0]
    judge(decode_attention(q, keys, values, strided, *rest), decode_attention_reference(q, keys, values, start, *rest))


def test_slots_further_apart_than_32_bits_reach(tmp_path):
    """Three slots 2^30 elements apart, in a file that is a hole but for them."""
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=2**31 + 16, dtype=torch.float16)
    cache = memory.as_strided((1, 1, 3, 16), (16, 16, 2**30, 1))
    cache.copy_(randn(1, 1, 3, 16, seed=1))
    dense, q, rest = cache.clone(), randn(1, 2, 16, seed=0), (torch.tensor([0]), torch.tensor(3), 0.3)
    assert dense.is_contiguous()
    assert torch.equal(decode_attention(q, cache, cache, *rest), decode_attention(q, dense, dense, *rest))


def test_large_scores_stay_finite():
    q, *rest = arguments(6, 2, 16, 16)
    out = decode_attention(1e4 * q, *rest, splits=2)
    judge(out, decode_attention_reference(1e4 * q, *rest))
