"""Latent attention: one result by every path, whatever is cached, padded, packed or asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from upcycled_models import VARIANTS, left_padded, make_latent, token_ids

from posttrain.models.architecture import cache_bytes_per_token, cache_elements_per_token, normalise
from posttrain.models.upcycled import latent_upcycled
from posttrain.models.upcycled.latent_upcycled import LatentAttention


def _normed(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def _naive(
    layer: LatentAttention, hidden: torch.Tensor, frequencies: torch.Tensor, factor: float = 1.0
) -> torch.Tensor:
    """Multi-head latent attention as written down in the paper, one head and one query at a time."""
    config = layer.config
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
    compressed = hidden
    if config.qk_norm:
        keys = [_normed(head, layer.k_norm) for head in layer.k_proj(hidden).split(config.head_dim, dim=1)]
        compressed = torch.cat((hidden, *keys), dim=1)
    latent, shared = layer.kv_a_proj_with_mqa(compressed).split((layer.rank, rope), dim=1)
    if layer.query_rank is None:
        query = layer.q_proj(hidden)
    else:
        query = layer.q_a_proj(hidden)
        query = layer.q_b_proj(_normed(query, layer.q_a_layernorm) if config.qk_latent_layernorm else query)
    if config.qk_latent_layernorm:
        latent = _normed(latent, layer.kv_a_layernorm)
    up = layer.kv_b_proj.weight.view(layer.num_heads, nope + value, layer.rank)
    if config.qk_norm:
        heads = [_normed(head, layer.q_norm) for head in query.split(config.head_dim, dim=1)]
        group = config.num_attention_heads // config.num_key_value_heads
        query = torch.cat([head @ layer.q_map[h // group].T for h, head in enumerate(heads)], dim=1)
    query = query.view(len(hidden), layer.num_heads, nope + rope)

    def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
        pairs = torch.complex(x[: rope // 2], x[rope // 2 :]) * torch.polar(
            torch.full((rope // 2,), factor), position * frequencies
        )
        return torch.cat((pairs.real, pairs.imag))

    rows = []
    for t in range(len(hidden)):
        heads = []
        for h in range(layer.num_heads):
            keys, values = latent @ up[h, :nope].T, latent @ up[h, nope:].T
            scores = torch.stack(
                [
                    query[t, h, :nope] @ keys[s] + rotated(query[t, h, nope:], t) @ rotated(shared[s], s)
                    for s in range(t + 1)
                ]
            )
            heads.append((scores * scale).softmax(0) @ values[: t + 1])
        rows.append(torch.cat(heads))
    return layer.o_proj(torch.stack(rows))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_definition(variant: str, implementation: str) -> None:
    model = make_latent(**VARIANTS[variant])
    model.set_attn_implementation(implementation)
    rope = model.config.qk_rope_head_dim
    indices = VARIANTS[variant].get("rope_frequency_indices", list(range(0, 8, max(1, 16 // rope))))
    frequencies, factor = (1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16))[indices], 1.0
    if own := VARIANTS[variant].get("latent_rope_parameters"):
        llama = LlamaConfig(head_dim=rope, rope_parameters=dict(own), max_position_embeddings=512)
        frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](llama, None)
        assert factor > 1.1 and len(frequencies) == rope // 2
    layer, seen = model.model.layers[1].self_attn, {}
    layer.register_forward_hook(lambda module, args, output: seen.update(hidden=args[0], output=output))
    with torch.no_grad():
        model(token_ids(1, 7))
        assert torch.allclose(seen["output"][0], _naive(layer, seen["hidden"][0], frequencies, factor), atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [[6, 1, 1, 1, 1, 1, 1, 1], [5, 4, 4], [1, 12]], ids=["decode", "chunks", "late"])
def test_cached_steps_equal_one_forward(variant: str, implementation: str, cuts: list[int]) -> None:
    model = make_latent(**VARIANTS[variant])
    model.set_attn_implementation(implementation)
    ids = token_ids(2, 13)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DynamicCache(config=model.config), []
        for part in ids.split(cuts, dim=1):
            parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_absorbed_equals_expanded(variant: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_latent(**VARIANTS[variant])
    model.set_attn_implementation(implementation)
    ids, mask, _ = left_padded([4, 9, 12])
    results, calls = [], []
    for absorbs in (True, False):
        absorbed = LatentAttention._absorbed
        monkeypatch.setattr(LatentAttention, "_absorbs", lambda *args, absorbs=absorbs: absorbs)
        monkeypatch.setattr(
            LatentAttention, "_absorbed", lambda *args, absorbed=absorbed: (calls.append(1), absorbed(*args))[1]
        )
        cache = DynamicCache(config=model.config)
        with monkeypatch.context() as prefill, torch.no_grad():
            prefill.setattr(LatentAttention, "_absorbs", lambda *args: False)
            model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        before = len(calls)
        with torch.no_grad():
            chunk = model(ids[:, 6:11], attention_mask=mask[:, :11], past_key_values=cache).logits
            step = model(ids[:, 11:], attention_mask=mask, past_key_values=cache).logits
        assert (len(calls) > before) == absorbs
        monkeypatch.setattr(LatentAttention, "_absorbed", absorbed)
        results.append(torch.cat((chunk, step), dim=1))
    real = mask[:, 6:].bool()
    assert torch.allclose(results[0][real], results[1][real], atol=1e-5)


def test_long_queries_are_expanded_and_short_ones_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, paths = make_latent(kv_lora_rank=24), []
    for name in ("_absorbed", "_expanded"):
        method = getattr(LatentAttention, name)
        monkeypatch.setattr(
            LatentAttention,
            name,
            lambda *args, _name=name, _method=method, **kwargs: (paths.append(_name), _method(*args, **kwargs))[1],
        )
    cache = DynamicCache(config=model.config)
    # r 24, d_n + d_v 24: latent space costs less up to 24 queries.
    for length, path in ((5, "_expanded"), (24, "_absorbed"), (25, "_expanded"), (1, "_absorbed")):
        paths.clear()
        with torch.no_grad():
            model(token_ids(1, length), past_key_values=cache)
        assert paths == [path, path], length


def test_an_adapter_on_the_up_projection_is_not_skipped() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    model = make_latent()
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = Doubled(layer.self_attn.kv_b_proj)
    ids, cache = token_ids(), DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        model(ids[:, :-1], past_key_values=cache)
        assert torch.allclose(model(ids[:, -1:], past_key_values=cache).logits[:, 0], whole[:, -1], atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_left_padded_rows_equal_single_rows(implementation: str) -> None:
    model = make_latent(mixers=["latent_attention", "full_attention"])
    model.set_attn_implementation(implementation)
    ids, mask, rows = left_padded([5, 9, 12])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
        for index, row in enumerate(rows):
            assert torch.allclose(batch[index, -len(row) :], model(row[None]).logits[0], atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(implementation: str) -> None:
    model = make_latent()
    model.set_attn_implementation(implementation)
    documents = [token_ids(1, length, seed=length) for length in (4, 6, 3)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, dim=1), position_ids=positions).logits
        single = torch.cat([model(document).logits for document in documents], dim=1)
    assert torch.allclose(packed, single, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "ranks by layer", "beside full attention"])
def test_cache_bytes_are_as_predicted(variant: str, dtype: torch.dtype) -> None:
    model = make_latent(**VARIANTS[variant]).to(dtype)
    ids = token_ids(3, 11)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :2], past_key_values=cache)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    arch = normalise(model.config.to_dict())
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert measured == 3 * 13 * cache_bytes_per_token(arch, element_size=dtype.itemsize)
    storage = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert storage == measured, "the cache keeps a larger tensor alive"
    by_layer = [(layer.keys.numel() + layer.values.numel()) // (3 * 13) for layer in cache.layers]
    assert by_layer == cache_elements_per_token(arch)


def test_gradients_with_checkpointing_are_equal() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_latent(mixers=["latent_attention", "full_attention"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        model(token_ids(), labels=token_ids()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_bf16_forward_stays_close() -> None:
    model = make_latent()
    ids = token_ids()
    with torch.no_grad():
        exact = model(ids).logits.softmax(-1)
        rounded = model.to(torch.bfloat16)(ids).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float().softmax(-1) - exact).abs().max() < 0.1


def test_frequencies_stay_fp32_when_the_model_is_cast() -> None:
    rotary = make_latent().model.rotary_emb
    exact = rotary.inv_freq.clone()
    rotary.to(torch.bfloat16)
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, exact)


def test_bf16_autocast_over_fp32_weights_trains() -> None:
    model = make_latent().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(token_ids(), labels=token_ids()).loss
    loss.backward()
    exact = make_latent()(token_ids(), labels=token_ids()).loss
    assert abs(loss.item() - exact.item()) < 0.05 * exact.item()


def test_attention_weights_cannot_be_returned() -> None:
    with pytest.raises(ValueError, match="attention weights"):
        make_latent()(token_ids(), output_attentions=True)


def test_the_longest_absorbed_query_is_bounded() -> None:
    layer = make_latent(kv_lora_rank=8).model.layers[0].self_attn
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert layer._absorbs(latent_upcycled.ABSORB_AT_MOST, 1000, mask)
    assert not layer._absorbs(latent_upcycled.ABSORB_AT_MOST + 1, 1000, mask)
    assert not layer._absorbs(2, 1000, None)
