"""`decode_attention` on CPU: torch's attention with a mask, and the model's own latent attention."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import randn, relative_error
from posttrain_kernels.decode_attention import decode_attention
from posttrain_kernels.decode_attention.reference import masked_attention
from posttrain_kernels.decode_attention.tiles import TILES, choose_splits, choose_tile
from posttrain_kernels.rotary_cache import latent_cache, rotate
from source_models import make_source
from torch import nn

STARTS, LENGTH, CAPACITY = torch.tensor([0, 2, 6, 7]), torch.tensor(7), 9


def cache(shared, width, seed, dtype=torch.float64):
    full = randn(len(STARTS) + 1, shared, CAPACITY, width, seed=seed, dtype=dtype)
    slots, start = torch.arange(CAPACITY), torch.cat((STARTS, torch.tensor([CAPACITY])))
    return full.masked_fill(~((slots >= start[:, None]) & (slots < LENGTH))[:, None, :, None], float("nan"))


@pytest.mark.parametrize(("heads", "shared"), [(6, 2), (3, 3), (7, 1)])
def test_is_torchs_attention_with_a_mask(heads, shared):
    q = randn(len(STARTS), heads, 8, seed=0, dtype=torch.float64)
    keys, values = cache(shared, 8, 1), cache(shared, 6, 2)
    out = decode_attention(q, keys, values, STARTS, LENGTH, 0.3)
    for row in range(3):
        k, v = (x[row : row + 1, :, STARTS[row] : LENGTH] for x in (keys, values))
        expected = nn.functional.scaled_dot_product_attention(
            q[row : row + 1, :, None], k, v, scale=0.3, enable_gqa=True
        )
        assert relative_error(out[row], expected[0, :, 0]) < 1e-14
    assert not out[3].any()


def test_the_mask_alone_bounds_the_slots_where_the_length_is_on_a_device():
    q, keys, values = randn(4, 6, 8, seed=0, dtype=torch.float64), cache(2, 8, 1), cache(2, 6, 2)
    out = masked_attention(q, keys[:4], values[:4], STARTS, LENGTH, 0.3)
    assert relative_error(out, decode_attention(q, keys, values, STARTS, LENGTH, 0.3)) < 1e-15


@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_is_the_models_latent_attention_from_an_empty_cache_on(normed):
    """Token by token through the two operators against LatentAttention's expanded path on the whole sequence."""
    module = latent_module(normed)
    rows, tokens, heads = 2, 6, module.num_heads
    hidden = randn(rows, tokens, module.config.hidden_size, seed=0, dtype=torch.float64)
    cos, sin = (randn(tokens, module.rope_dim, seed=seed, dtype=torch.float64) for seed in (1, 2))
    embeddings = tuple(table.expand(rows, -1, -1) for table in (cos, sin))
    expected = module(hidden, embeddings)
    latents = torch.full((rows, 1, tokens, module.rank), float("nan"), dtype=torch.float64)
    ropes = torch.full((rows, 1, tokens, module.rope_dim), float("nan"), dtype=torch.float64)
    to_key, to_value = module.kv_b_proj.weight.unflatten(0, (heads, -1)).split((module.nope_dim, module.value_dim), 1)
    norm = (module.kv_a_layernorm.weight, module.kv_a_layernorm.variance_epsilon) if normed else ()
    for slot in range(tokens):
        x, at = hidden[:, slot], torch.full((rows,), slot)
        q_nope, q_rope = module.q_proj(x).unflatten(-1, (heads, -1)).split((module.nope_dim, module.rope_dim), dim=-1)
        latent_cache(module.kv_a_proj_with_mqa(x), cos, sin, at, torch.tensor(slot), latents, ropes, *norm)
        absorbed = torch.einsum("bhn,hnr->bhr", q_nope, to_key)
        turned = rotate(q_rope, cos, sin, at)
        start, length = torch.zeros(rows, dtype=torch.long), torch.tensor(slot + 1)
        mixed = decode_attention(absorbed, latents, latents, start, length, module.scaling, turned, ropes)
        out = module.o_proj(torch.einsum("bhr,hvr->bhv", mixed, to_value).flatten(1))
        # UpcycledRMSNorm computes in fp32, the operator on fp64 input in fp64; SDPA is exact.
        assert relative_error(out, expected[:, slot]) < (1e-6 if normed else 1e-12)


def latent_module(normed):
    from posttrain.models.upcycled import UpcycledConfig
    from posttrain.models.upcycled.latent_upcycled import LatentAttention

    source = make_source("llama").config
    layers = source.num_hidden_layers
    config = UpcycledConfig.from_source(
        source,
        mixers=["latent_attention"] * layers,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        qk_latent_layernorm=normed,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    module = LatentAttention(config, 0).double().eval()
    if normed:
        module.kv_a_layernorm.weight.data.copy_(randn(10, seed=3))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_computes_in_fp32(dtype):
    q, keys, values = (x.to(dtype) for x in (randn(4, 6, 8, seed=0), cache(2, 8, 1), cache(2, 8, 2)))
    out = decode_attention(q, keys, values, STARTS, LENGTH, 0.3)
    exact = decode_attention(q.double(), keys.double(), values.double(), STARTS, LENGTH, 0.3)
    assert out.dtype == dtype
    assert relative_error(out, exact) < 2 * torch.finfo(dtype).eps


def test_an_empty_cache_gives_zeros():
    q, keys = randn(4, 6, 8, seed=0), torch.full((4, 2, 5, 8), float("nan"))
    assert not decode_attention(q, keys, keys, torch.zeros(4, dtype=torch.long), torch.tensor(0), 1.0).any()


def test_splits_fill_the_card_only_where_rows_are_few_and_long():
    assert choose_splits(768, 4096) == 1
    assert choose_splits(3, 256) == 1
    assert choose_splits(3, 4096) == 16
    assert choose_splits(3, 10**6) == 88


@pytest.mark.parametrize("group", [1, 3, 7, 33])
@pytest.mark.parametrize("width", [16, 65, 512])
def test_a_tile_is_legal_for_tensor_cores(group, width):
    tile = choose_tile(group, width, 16)
    assert tile.heads in (16, 32) and tile.slots >= 16 and tile.heads * TILES[512][0] <= 1024


def test_errors():
    q, keys, start, length = (
        torch.zeros(2, 6, 4),
        torch.zeros(3, 2, 5, 4),
        torch.zeros(2, dtype=torch.long),
        torch.tensor(1),
    )
    with pytest.raises(ValueError, match="wider|wide"):
        choose_tile(1, 513, 16)
    with pytest.raises(ValueError, match="do not fit the query"):
        decode_attention(q[..., :3], keys, keys, start, length, 1.0)
    with pytest.raises(ValueError, match="evenly"):
        decode_attention(q[:, :5], keys, keys, start, length, 1.0)
    with pytest.raises(ValueError, match="start"):
        decode_attention(q, keys, keys, start[:1], length, 1.0)
    with pytest.raises(ValueError, match="together"):
        decode_attention(q, keys, keys, start, length, 1.0, q)
    with pytest.raises(ValueError, match="rope_cache"):
        decode_attention(q, keys, keys, start, length, 1.0, q, keys[:, :, :3])
    with pytest.raises(RuntimeError, match="no gradient"):
        decode_attention(q.requires_grad_(), keys, keys, start, length, 1.0)
