"""`rotary_cache`, `latent_cache` and `rotate` on CPU: the model's own rotation, norms and order of heads."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import poisoned, randn, relative_error
from posttrain_kernels.rotary_cache import latent_cache, rotary_cache, rotate
from posttrain_kernels.rotary_cache.op import rotary_cache as operator

from posttrain.models.upcycled.norm_upcycled import UpcycledRMSNorm
from posttrain.models.upcycled.rotary_upcycled import apply_rotary

ROWS, BATCH, HEADS, SHARED, WIDTH, CAPACITY, SLOT = 3, 4, 6, 2, 8, 5, 2
POSITIONS = torch.tensor([5, 0, 3])


def tables(width, dtype):
    angles = torch.outer(torch.arange(7.0), 1000 ** -torch.linspace(0, 1, width // 2))
    both = torch.cat((angles, angles), dim=-1)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated(x, cos, sin):
    """The model's rotation of one token a row, x [B, H, d]."""
    return apply_rotary(x.unsqueeze(2), cos[POSITIONS].unsqueeze(1), sin[POSITIONS].unsqueeze(1)).squeeze(2)


def norm(width, seed, dtype):
    module = UpcycledRMSNorm(width, 1e-5).to(dtype)
    module.weight.data.copy_(randn(width, seed=seed))
    return module


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rotary_cache_is_the_models_projection_rotation_and_cache(dtype):
    query, key, value = (randn(ROWS, n, WIDTH, seed=n, dtype=dtype) for n in (HEADS, SHARED, SHARED + 1))
    value = value[:, :SHARED]
    caches = [poisoned(BATCH, SHARED, CAPACITY, WIDTH, dtype=dtype) for _ in range(2)]
    qkv = torch.cat([part.flatten(1) for part in (query, key, value)], dim=1)
    out = rotary_cache(qkv, *tables(WIDTH, dtype), POSITIONS, torch.tensor(SLOT), *caches)
    assert torch.equal(out, rotated(query, *tables(WIDTH, dtype)))
    for cache, expected in zip(caches, (rotated(key, *tables(WIDTH, dtype)), value), strict=True):
        assert torch.equal(cache[:ROWS, :, SLOT], expected)
        assert int((~cache.isnan()).sum()) == expected.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_heads_are_normalised_before_they_turn(dtype):
    qkv = randn(ROWS, (HEADS + 2 * SHARED) * WIDTH, seed=0, dtype=dtype)
    caches = [poisoned(BATCH, SHARED, CAPACITY, WIDTH, dtype=dtype) for _ in range(2)]
    q_norm, k_norm = norm(WIDTH, 1, dtype), norm(WIDTH, 2, dtype)
    weights = (q_norm.weight, k_norm.weight, 1e-5)
    out = rotary_cache(qkv, *tables(WIDTH, dtype), POSITIONS, torch.tensor(SLOT), *caches, *weights)
    heads = qkv.unflatten(1, (-1, WIDTH))
    assert torch.equal(out, rotated(q_norm(heads[:, :HEADS]), *tables(WIDTH, dtype)))
    key = rotated(k_norm(heads[:, HEADS : HEADS + SHARED]), *tables(WIDTH, dtype))
    assert torch.equal(caches[0][:ROWS, :, SLOT], key)
    assert torch.equal(caches[1][:ROWS, :, SLOT], heads[:, HEADS + SHARED :])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_latent_cache_is_the_models_compression(dtype, normed):
    rank, width = 12, 4
    kv_a, module = randn(ROWS, rank + width, seed=0, dtype=dtype), norm(rank, 1, dtype)
    latents, ropes = poisoned(BATCH, CAPACITY, rank, dtype=dtype), poisoned(BATCH, CAPACITY, width, dtype=dtype)
    weight = module.weight if normed else None
    latent_cache(kv_a, *tables(width, dtype), POSITIONS, torch.tensor(SLOT), latents, ropes, weight, 1e-5)
    latent, k_rope = kv_a.split((rank, width), dim=-1)
    assert torch.equal(latents[:ROWS, SLOT], module(latent) if normed else latent)
    assert torch.equal(ropes[:ROWS, SLOT], rotated(k_rope.unsqueeze(1), *tables(width, dtype)).squeeze(1))
    assert int((~latents.isnan()).sum()) == ROWS * rank and int((~ropes.isnan()).sum()) == ROWS * width


def test_tables_in_fp32_are_cast_to_the_models_dtype():
    x = randn(ROWS, 2, WIDTH, seed=0, dtype=torch.bfloat16)
    wide, narrow = tables(WIDTH, torch.float32), tables(WIDTH, torch.bfloat16)
    assert torch.equal(rotate(x, *wide, POSITIONS), rotated(x, *narrow))


def test_rotation_keeps_lengths_and_scores_depend_on_the_distance():
    """The property the rotation exists for: (R_a q)·(R_b k) is a function of a − b."""
    cos, sin = tables(WIDTH, torch.float64)
    q, k = (randn(1, 1, WIDTH, seed=seed, dtype=torch.float64) for seed in (0, 1))

    def score(a, b):
        at = (rotate(x, cos, sin, torch.tensor([place])) for x, place in ((q, a), (k, b)))
        return (next(at) * next(at)).sum()

    # Tables are fp32 numbers: exact only to their rounding.
    assert abs(score(5, 3) - score(2, 0)) < 1e-6
    assert abs(score(5, 3) - score(5, 2)) > 1e-3
    assert relative_error(rotate(q, cos, sin, torch.tensor([4])).norm(), q.norm()) < 1e-6


def test_errors():
    cache, qkv = torch.zeros(2, 2, 3, 4), torch.zeros(2, 24)
    rest = (*tables(4, torch.float32), torch.zeros(2, dtype=torch.long), torch.tensor(0), cache)
    with pytest.raises(ValueError, match="do not fit 2 rows"):
        operator(qkv, *rest, cache[:, :1])
    with pytest.raises(ValueError, match="no queries"):
        operator(qkv[:, :16], *rest, cache)
    with pytest.raises(ValueError, match="together"):
        operator(qkv, *rest, cache, torch.ones(4))
    with pytest.raises(ValueError, match="tables"):
        operator(qkv, *tables(6, torch.float32), *rest[2:], cache)
    with pytest.raises(ValueError, match="positions"):
        operator(qkv, *rest[:2], torch.zeros(3, dtype=torch.long), *rest[3:], cache)
    with pytest.raises(ValueError, match="latent of 4"):
        latent_cache(qkv, *rest[:4], torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(RuntimeError, match="no gradient"):
        operator(qkv.requires_grad_(), *rest, cache)
