"""The Mamba-2 mixer: its own equations in fp64, token by token, padding, packing, and what stays fp32."""

from __future__ import annotations

import math

import pytest
import torch
from hybrid_models import ORDERS, VARIANTS, make_hybrid
from transformers import DynamicCache
from upcycled_models import left_padded, token_ids

from posttrain.models.upcycled import mamba_upcycled
from posttrain.models.upcycled.mamba_upcycled import FP32, Mamba2

T = 37


def mixer(**variant) -> Mamba2:
    return make_hybrid(**variant).model.layers[0].self_attn


def inputs(rows: int = 2, length: int = T, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(seed))


def oracle(mixer: Mamba2, u: torch.Tensor) -> torch.Tensor:
    """The equations of the mixer in fp64: head by head, token by token, from the named rows of its weights."""
    config = mixer.config
    heads, shared, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    p = {name: tensor.detach().double() for name, tensor in mixer.named_parameters()}
    rows = u.double() @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    # Row order: z, x, B, C, dt.
    ends = [heads * width, shared * width, shared * width, heads * width, heads]
    z, x, b, c, dt = rows.split(ends, dim=-1)
    group = heads // shared
    x, b = (part.unflatten(-1, (shared, width)) for part in (x, b))
    if config.mamba_repeat_before_conv:
        x, b = (torch.stack([part[:, :, h // group] for h in range(heads)], 2) for part in (x, b))
    flat = torch.cat([x.flatten(2), b.flatten(2), c], dim=-1)
    mixed = torch.zeros_like(flat)
    taps, kernel = p["conv1d.weight"][:, 0], config.mamba_conv_kernel
    for t in range(u.shape[1]):
        for k in range(kernel):
            if (source := t - (kernel - 1) + k) >= 0:
                mixed[:, t] += taps[:, k] * flat[:, source]
    mixed = mixed + p["conv1d.bias"]
    mixed = mixed / (1 + torch.exp(-mixed)) if config.mamba_conv_activation else mixed
    x, b, c = mixed.split([x.flatten(2).shape[-1]] * 2 + [heads * width], dim=-1)
    x, b, c = (part.unflatten(-1, (-1, width)) for part in (x, b, c))
    if config.qk_norm:
        b, c = (_rms(part, config.rms_norm_eps) * p[f"{name}_norm.weight"] for part, name in ((b, "b"), (c, "c")))
    delta = torch.log1p(torch.exp(dt + p["dt_bias"]))
    out = torch.zeros(*u.shape[:2], heads, width, dtype=torch.float64)
    for row in range(u.shape[0]):
        for h in range(heads):
            own = [h // (heads // part.shape[2]) for part in (x, b, c)]
            state = torch.zeros(width, width, dtype=torch.float64)
            for t in range(u.shape[1]):
                decay = math.exp(-math.exp(p["A_log"][h]) * delta[row, t, h])
                state = decay * state + delta[row, t, h] * torch.outer(x[row, t, own[0]], b[row, t, own[1]])
                out[row, t, h] = state @ c[row, t, own[2]] + p["D"][h] * x[row, t, own[0]]
    gated = out.flatten(2) * z / (1 + torch.exp(-z))
    if config.mamba_norm:
        gated = _rms(gated.unflatten(-1, (heads, width)), config.rms_norm_eps).flatten(2) * p["norm.weight"]
    return gated @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


def _rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_its_equations(variant: str) -> None:
    module, u = mixer(**VARIANTS[variant]), inputs()
    with torch.no_grad():
        out, expected = module(u), oracle(module, u)
        assert torch.allclose(out.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        assert torch.allclose(module.double()(u.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("variant", ["4 heads share", "own taps", "qk norm"])
def test_the_code_that_saved_models_carry_gives_the_same(
    variant: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.models.upcycled import ssd_upcycled

    module, u = mixer(**VARIANTS[variant]), inputs()
    options = {"documents": torch.arange(T)[None].expand(2, -1) // 9} if documents else {}
    with torch.no_grad():
        expected = module(u, **options)
        monkeypatch.setattr(mamba_upcycled, "ssd_scan", ssd_upcycled.chunked_scan)
        assert torch.equal(module(u, **options), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_steps_equal_one_pass(variant: str) -> None:
    model = make_hybrid(**VARIANTS[variant])
    ids = token_ids(3, T)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(part, past_key_values=cache).logits for part in ids.split([2, 11, 1, 1, 16, 1, 1, 1, 3], dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    state = cache.layers[0].recurrent_states[0]
    assert state.dtype == torch.float32 and state.shape == (3, 8, 8, 8)


def test_tied_taps_are_shared_taps_and_independent_ones_are_not() -> None:
    shared, own = mixer(), mixer(mamba_repeat_before_conv=True)
    u = inputs()
    with torch.no_grad():
        own.load_state_dict(shared.state_dict() | {name: own.conv1d.state_dict()[name[7:]] for name in CONV})
        assert not torch.allclose(own(u), shared(u), atol=1e-2)
        for mine, theirs in zip(own.conv1d.parameters(), shared.conv1d.parameters(), strict=True):
            parts = theirs.split([shared.shared, shared.shared, shared.inner])
            each = [part.unflatten(0, (2, 8)).repeat_interleave(4, 0).flatten(0, 1) for part in parts[:2]]
            mine.copy_(torch.cat([*each, parts[2]]))
        assert torch.allclose(own(u), shared(u), atol=1e-6)


CONV = ("conv1d.weight", "conv1d.bias")


@pytest.mark.parametrize("biased", [False, True])
def test_causal_linear_attention_is_a_special_case(biased: bool) -> None:
    """Δ = 1, no decay, no skip, a convolution that passes the last token, a gate of one: Σ_{s≤t} (q_t·k_s) v_s."""
    module, u = mixer(mamba_conv_activation=False, mamba_norm=False, mamba_bias=True), inputs()
    inner, shared = module.inner, module.shared
    with torch.no_grad():
        for tensor in (module.in_proj.weight, module.in_proj.bias):
            tensor[:inner] = 0
            tensor[-8:] = 0
        if not biased:
            module.in_proj.bias.zero_()
        module.in_proj.bias[:inner] = 1.2784645  # silu of it is one
        module.dt_bias.fill_(math.log(math.e - 1))
        module.A_log.fill_(-40.0)
        module.D.zero_()
        module.conv1d.weight.zero_()[..., -1] = 1
        module.conv1d.bias.zero_()
        projected = (u @ module.in_proj.weight.T + module.in_proj.bias).split([inner, shared, shared, inner, 8], -1)
        v, k, q = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in projected[1:4])
        k, v = (part.repeat_interleave(4, 1) for part in (k, v))
        expected = module.out_proj(((q @ k.mT).tril() @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(module(u), expected, atol=1e-4)


@pytest.mark.parametrize("variant", ["4 heads share", "biases", "qk norm, biases, own taps"])
@pytest.mark.parametrize("order", ORDERS)
def test_left_padding_does_not_enter(order: str, variant: str) -> None:
    model = make_hybrid(ORDERS[order], **VARIANTS[variant])
    ids, mask, rows = left_padded([5, 19, 26])
    with torch.no_grad():
        batch = model(ids, attention_mask=mask).logits
        for index, row in enumerate(rows):
            assert torch.allclose(batch[index, -len(row) :], model(row[None]).logits[0], atol=1e-4)
        cache = DynamicCache(config=model.config)
        chunks = [model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache).logits]
        chunks.append(model(ids[:, 6:24], attention_mask=mask[:, :24], past_key_values=cache).logits)
        for t in (24, 25):
            chunks.append(model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(chunks, 1)[mask.bool()], batch[mask.bool()], atol=1e-4)


def test_what_stands_at_padded_places_does_not_matter() -> None:
    module, u = mixer(mamba_bias=True), inputs(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = module(u[:1, 4:])
        u[0, :4] = torch.nan
        assert torch.allclose(module(u, padding_mask=mask)[:1, 4:], expected, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", ["4 heads share", "own taps", "no convolution", "qk norm"])
@pytest.mark.parametrize("order", ORDERS)
def test_packed_documents_equal_documents_one_by_one(order: str, variant: str, training: bool) -> None:
    model = make_hybrid(ORDERS[order], **VARIANTS[variant]).train(training)
    lengths = ([4, 19, 2, 1, 5], [1, 27, 3])
    documents = [[token_ids(1, length, seed=7 * length + row)[0] for length in of] for row, of in enumerate(lengths)]
    ids = torch.stack([torch.cat(row) for row in documents])
    positions = torch.stack([torch.cat([torch.arange(length) for length in of]) for of in lengths])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        alone = [torch.cat([model(input_ids=document[None]).logits[0] for document in row]) for row in documents]
    assert torch.allclose(packed, torch.stack(alone), atol=1e-4)


def test_a_row_never_reaches_another() -> None:
    model, ids = make_hybrid(ORDERS["state first"]), token_ids(2, 12)
    cache, other = (DynamicCache(config=model.config) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(torch.cat([ids[:1].flip(1), ids[1:]]), past_key_values=other)
        steps = [
            model(token_ids(2, 1, seed=seed).index_fill(0, torch.tensor([1]), 7), past_key_values=past)
            for seed, past in ((0, cache), (1, other))
        ]
    assert torch.allclose(steps[0].logits[1], steps[1].logits[1], atol=1e-6)
    assert not torch.allclose(steps[0].logits[0], steps[1].logits[0], atol=1e-2)


def test_gradients_flow_through_a_cached_state() -> None:
    """A text in two parts: the second part's loss reaches the first through state and convolution as in one pass."""
    model, ids = make_hybrid(("mamba2", "mamba2")), token_ids(2, 20)
    embeddings = model.get_input_embeddings()(ids).detach()
    gradients = []
    for cut in (20, 9):
        u, cache, logits = embeddings.clone().requires_grad_(), DynamicCache(config=model.config), []
        for part in (slice(cut), slice(cut, 20)):
            if part.start != 20:
                logits.append(model(inputs_embeds=u[:, part], past_key_values=cache).logits)
        torch.cat(logits, 1)[:, 12:].logsumexp(-1).sum().backward()
        gradients.append(u.grad)
    assert gradients[0][:, 2].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = make_hybrid(ORDERS["state first"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        positions = torch.arange(20)[None].expand(2, -1) % 11
        model(token_ids(2, 20), position_ids=positions, labels=token_ids(2, 20)).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(found[0][f"model.layers.0.self_attn.{name}"].abs().sum() > 0 for name in (*FP32, "conv1d.weight"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_casting_keeps_the_decays() -> None:
    model = make_hybrid(("mamba2", "full_attention"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = token_ids(1, 30)
    with torch.no_grad():
        expected = model(ids).logits
        small = model.to(torch.bfloat16)
        names = [name for name in before if name.endswith(FP32)]
        assert len(names) == 3
        for name, tensor in small.state_dict().items():
            assert tensor.dtype == (torch.float32 if name in names else torch.bfloat16), name
            assert name not in names or torch.equal(tensor, before[name])
        cache = DynamicCache(config=model.config)
        out = small(ids, past_key_values=cache).logits
    assert torch.nn.functional.cosine_similarity(out.float(), expected, dim=-1).min() > 0.99
    assert cache.layers[0].recurrent_states[0].dtype == torch.float32
    assert cache.layers[0].conv_states[0].dtype == torch.bfloat16


def test_bf16_steps_follow_a_bf16_pass() -> None:
    """An fp32 state: 100 steps stay as close to the pass as one rounding of the inputs, not of the state."""
    model, ids = make_hybrid().to(torch.bfloat16), token_ids(1, 110)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        whole = cache.layers[0].recurrent_states[0].clone()
        cache = DynamicCache(config=model.config)
        for t in range(110):
            model(ids[:, t : t + 1], past_key_values=cache)
    state = cache.layers[0].recurrent_states[0]
    assert (state - whole).norm() < 3e-3 * whole.norm()


def test_another_cache_is_refused() -> None:
    model = make_hybrid(("mamba2", "full_attention"))
    with pytest.raises(ValueError, match=r"no state for layer 0: make it with DynamicCache\(config=model.config\)"):
        model(token_ids(), past_key_values=DynamicCache())
