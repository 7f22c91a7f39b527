"""The Triton latent decoding against its reference, fp32: ragged, short and empty rows, NaN outside their slots."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.mla_decode import mla_decode, mla_decode_reference
from posttrain_kernels.mla_decode.launch import mla_decode_triton
from posttrain_kernels.mla_decode.tiles import Tile

pytestmark = pytest.mark.usefixtures("poison_empty")

STARTS, LENGTH, CAPACITY = (0, 3, 21, 22, 36, 37, 40), 37, 41
"""A full row, a ragged one, one of exactly a tile of 16, two shorter than a tile, and two without slots."""


def cache(width, seed):
    """[Bmax, S, d] with NaN wherever no row may look, two rows beyond the batch included."""
    full = randn(len(STARTS) + 2, CAPACITY, width, seed=seed)
    slots = torch.arange(CAPACITY)
    start = torch.tensor([*STARTS, CAPACITY, CAPACITY])
    return full.masked_fill(~((slots >= start[:, None]) & (slots < LENGTH))[..., None], float("nan"))


def arguments(heads, rank, rope):
    q_latent, q_rope = randn(len(STARTS), heads, rank, seed=0), randn(len(STARTS), heads, rope, seed=3)
    return q_latent, q_rope, cache(rank, 1), cache(rope, 2), torch.tensor(STARTS), torch.tensor(LENGTH), 0.2


def judge(out, reference):
    assert relative_error(out, reference) < 2e-6
    assert not out[5:].any() and not out.isnan().any()


@pytest.mark.parametrize("splits", [None, 1, 2, 5])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(9, 48, 16), (3, 96, 48), (20, 16, 32)])
def test_against_the_reference(heads, rank, rope, splits):
    given = arguments(heads, rank, rope)
    judge(mla_decode(*given, splits=splits), mla_decode_reference(*given))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("slots_first", [False, True])
def test_every_form_of_a_program_with_several_blocks_of_heads(slots_first, tma, splits):
    given = arguments(20, 48, 16)
    tile = Tile(16, 16, 4, 2, slots_first=slots_first, tma=tma)
    judge(mla_decode_triton(*given, splits=splits, tile=tile), mla_decode_reference(*given))


@pytest.mark.parametrize("splits", [40, 70])
def test_more_parts_than_the_combination_loads_at_a_time(splits):
    given = arguments(2, 80, 16)
    judge(mla_decode(*given, splits=splits), mla_decode_reference(*given))


@pytest.mark.parametrize("tma", [False, True])
def test_strided_caches_and_queries(tma):
    """Slots in front of rows; the copy engine cannot address them and the kernel does."""
    q_latent, q_rope, latent, rope, *rest = arguments(6, 32, 16)
    expected = mla_decode_reference(q_latent, q_rope, latent, rope, *rest)
    both = torch.cat((latent, rope), dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
    query = torch.cat((q_rope, q_latent), dim=-1)
    given = query[..., 16:], query[..., :16], both[..., :32], both[..., 32:], *rest
    judge(mla_decode_triton(*given, splits=2, tile=Tile(16, 16, 4, 2, tma=tma)), expected)


def test_strided_starts_and_a_length_of_one_dimension():
    q_latent, q_rope, latent, rope, start, length, scale = arguments(6, 32, 16)
    strided = torch.stack((start, torch.zeros_like(start)), dim=1)[:, 0]
    expected = mla_decode_reference(q_latent, q_rope, latent, rope, start, length, scale)
    judge(mla_decode(q_latent, q_rope, latent, rope, strided, length.reshape(1), scale), expected)


def test_slots_further_apart_than_32_bits_reach(tmp_path):
    """Three slots 2^30 elements apart, in a file that is a hole but for them."""
    memory = torch.from_file(str(tmp_path / "cache"), shared=True, size=2**31 + 16, dtype=torch.float16)
    latent = memory.as_strided((1, 3, 16), (16, 2**30, 1))
    latent.copy_(randn(1, 3, 16, seed=1))
    dense, rope = latent.clone(), randn(1, 3, 16, seed=2, dtype=torch.float16)
    q, rest = randn(1, 2, 16, seed=0), (torch.tensor([0]), torch.tensor(3), 0.3)
    assert dense.is_contiguous()
    assert torch.equal(mla_decode(q, q, latent, rope, *rest), mla_decode(q, q, dense, rope, *rest))


def test_large_scores_stay_finite():
    q_latent, *rest = arguments(6, 32, 16)
    given = 1e4 * q_latent, *rest
    judge(mla_decode(*given, splits=2), mla_decode_reference(*given))
