"""`mla_decode` on CPU: expanded attention in fp64, precision, bounds, the choice of tiles and splits, and refusals."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.mla_decode import mla_decode
from posttrain_kernels.mla_decode.tiles import (
    MULTIPROCESSORS,
    SHARED_MEMORY,
    TILES,
    Tile,
    choose_splits,
    choose_tile,
)

STARTS, LENGTH, CAPACITY = torch.tensor([0, 2, 6, 7]), torch.tensor([7]), 9
RANK, ROPE, HEADS = 16, 32, 5


def cache(width, seed, dtype=torch.float64):
    """[Bmax, S, d], NaN wherever no row may look."""
    full = randn(len(STARTS) + 1, CAPACITY, width, seed=seed, dtype=dtype)
    slots, start = torch.arange(CAPACITY), torch.cat((STARTS, torch.tensor([CAPACITY])))
    return full.masked_fill(~((slots >= start[:, None]) & (slots < LENGTH))[..., None], float("nan"))


def arguments(dtype=torch.float64):
    q_latent, q_rope = (randn(len(STARTS), HEADS, width, seed=width, dtype=dtype) for width in (RANK, ROPE))
    return q_latent, q_rope, cache(RANK, 1, dtype), cache(ROPE, 2, dtype), STARTS, LENGTH, 0.3


def test_is_attention_of_expanded_heads():
    """Keys and values of every head by W_K and W_V, torch's attention over them; the operator sees W_K in the query."""
    nope, value = 6, 4
    to_key = randn(HEADS, nope, RANK, seed=5, dtype=torch.float64)
    to_value = randn(HEADS, value, RANK, seed=6, dtype=torch.float64)
    q_nope = randn(len(STARTS), HEADS, nope, seed=7, dtype=torch.float64)
    _, q_rope, latent, rope, *rest = arguments()
    mixed = mla_decode(torch.einsum("bhn,hnr->bhr", q_nope, to_key), q_rope, latent, rope, *rest)
    out = torch.einsum("bhr,hvr->bhv", mixed, to_value)
    for row in range(3):
        latents, turned = latent[row, STARTS[row] : LENGTH], rope[row, STARTS[row] : LENGTH]
        keys = torch.cat((latents @ to_key.transpose(1, 2), turned.expand(HEADS, -1, -1)), dim=-1)
        query = torch.cat((q_nope[row], q_rope[row]), dim=-1).unsqueeze(1)
        scores = (query @ keys.transpose(1, 2) * 0.3).softmax(dim=-1)
        assert relative_error(out[row], (scores @ (latents @ to_value.transpose(1, 2)))[:, 0]) < 1e-14
    assert not out[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_computes_in_fp32(dtype):
    given = arguments(dtype)
    exact = mla_decode(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given))
    out = mla_decode(*given)
    assert out.dtype == dtype
    assert relative_error(out, exact) < 2 * torch.finfo(dtype).eps


def test_an_empty_cache_gives_zeros():
    q_latent, q_rope, *_ = arguments()
    empty = (torch.full((4, 5, width), float("nan")) for width in (RANK, ROPE))
    start = torch.zeros(4, dtype=torch.long)
    assert not mla_decode(q_latent.float(), q_rope.float(), *empty, start, torch.tensor(0), 1.0).any()


@pytest.mark.parametrize("rope", [16, 64, 128, 256])
@pytest.mark.parametrize("rank", [16, 96, 192, 512])
@pytest.mark.parametrize("heads", [1, 9, 16, 33, 128])
def test_a_tile_fits_a_multiprocessor(heads, rank, rope):
    """Accumulators in half of the registers, tiles in flight and queries in shared memory."""
    width = max(16, 1 << (rank - 1).bit_length())
    tile = choose_tile(heads, rank).fitted(2 * width, 2 * rope)
    assert tile.heads >= min(heads, 16) and tile.heads * width <= 128 * 32 * tile.warps
    assert tile.stages >= 2 and tile.slots >= 32
    memory = tile.shared_memory(2 * width, 2 * rope)
    assert 2 * (width + rope) * tile.slots * tile.stages + 2 * width * tile.heads < memory <= SHARED_MEMORY


def test_sizes_of_the_target_keep_their_gluon_tiles():
    for heads, rank, rope in ((32, 512, 64), (128, 512, 64), (32, 128, 32), (128, 128, 32)):
        tile = choose_tile(heads, rank)
        assert tile.gluon and tile.fitted(2 * rank, 2 * rope) == tile
    assert choose_tile(128, 128).fitted(256, 128).stages == 3
    assert choose_tile(128, 512).fitted(1024, 256) == Tile(64, 32, 8, 2, tma=True)


def test_tiles_of_a_width_are_ordered_by_heads():
    for width, heads in TILES:
        assert choose_tile(heads, width) == TILES[width, heads]
    assert choose_tile(16, 512).heads == 16 and choose_tile(17, 512).heads == choose_tile(500, 512).heads == 64
    assert choose_tile(4, 64, itemsize=4).slots == 16


@pytest.mark.parametrize("resident", [1, 2])
@pytest.mark.parametrize("programs", [1, 2, 4, 16, 64, 128, 500])
def test_splits_leave_no_half_empty_wave(programs, resident):
    """At 32,768 slots the waves' places are taken to nine tenths, or rows are many enough to need no splits."""
    tile = Tile(16, 64, 4, 2, resident=resident)
    splits, tiles = choose_splits(programs, 32768, tile), 512
    waves = -(-programs * splits // MULTIPROCESSORS)
    busy = programs * tiles / (waves * MULTIPROCESSORS * -(-tiles // splits))
    assert busy > 0.88 or splits == 1


def test_splits_do_not_exceed_the_tiles():
    tile = Tile(16, 64, 4, 2)
    assert choose_splits(1, 64, tile) == 1 and choose_splits(1, 0, tile) == 1
    assert 1 <= choose_splits(1, 640, tile) <= 10


def test_errors():
    q_latent, q_rope, latent, rope, start, length, scale = arguments()
    with pytest.raises(ValueError, match="513 wide; the kernels go up to 512"):
        choose_tile(1, 513)
    with pytest.raises(ValueError, match="latent_cache .* does not fit q_latent"):
        mla_decode(q_latent[..., :8], q_rope, latent, rope, start, length, scale)
    with pytest.raises(ValueError, match="latent_cache .* does not fit q_latent"):
        mla_decode(q_latent, q_rope, latent[:3], rope[:3], start, length, scale)
    with pytest.raises(ValueError, match="rope_cache .* does not fit latent_cache"):
        mla_decode(q_latent, q_rope, latent, rope[:, :4], start, length, scale)
    with pytest.raises(ValueError, match="q_rope .* does not fit rope_cache"):
        mla_decode(q_latent, q_rope[:, :3], latent, rope, start, length, scale)
    with pytest.raises(ValueError, match="start .* is not one slot for each of 4 rows"):
        mla_decode(q_latent, q_rope, latent, rope, start[:2], length, scale)
    with pytest.raises(RuntimeError, match="no gradient"):
        mla_decode(q_latent.requires_grad_(), q_rope, latent, rope, start, length, scale)
