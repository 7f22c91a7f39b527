"""An upcycled model with full attention everywhere is the source."""

from __future__ import annotations

import pytest
import torch
from source_models import FAMILIES, make_source
from upcycled_models import left_padded, token_ids

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycling import build_upcycled, convert_full_attention

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_source(family: str, implementation: str) -> None:
    source = make_source(family, attn_implementation=implementation)
    model = convert_full_attention(source)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, source(token_ids()).logits)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_any_grouping_of_heads_tied_or_not(kv_heads: int, tied: bool) -> None:
    source = make_source(num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    model = convert_full_attention(source)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, source(token_ids()).logits)


@pytest.mark.parametrize("rope", ROPE)
def test_scaled_rotary_embeddings_are_those_of_the_source(rope: str) -> None:
    source = make_source(rope_parameters=ROPE[rope], max_position_embeddings=64)
    model = convert_full_attention(source)
    ids = token_ids(2, 90)  # beyond the context: dynamic scaling must have moved its frequencies
    with torch.no_grad():
        expected = source(ids).logits
        assert torch.equal(model(ids).logits, expected)
        default = make_source(max_position_embeddings=64)(ids).logits
    assert not torch.allclose(expected, default), "the scaling does not show in this test"


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}], ids=str)
def test_llama_biases(changes: dict[str, bool]) -> None:
    source = make_source(**changes)
    with torch.no_grad():
        assert torch.equal(convert_full_attention(source)(token_ids()).logits, source(token_ids()).logits)


def test_left_padding_and_packing_as_in_the_source() -> None:
    source = make_source("qwen2")
    model = convert_full_attention(source)
    ids, mask, _ = left_padded([5, 9, 12])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask).logits
        assert torch.equal(padded, source(ids, attention_mask=mask).logits)
        packed = model(ids[2:], position_ids=positions).logits
        assert torch.equal(packed, source(ids[2:], position_ids=positions, use_cache=False).logits)
        assert torch.allclose(packed[:, 4:7], model(ids[2:, 4:7]).logits, atol=1e-5)


def test_loss_kept_logits_and_hidden_states() -> None:
    source = make_source()
    model = convert_full_attention(source)
    ids = token_ids()
    with torch.no_grad():
        ours, theirs = (m(ids, labels=ids, output_hidden_states=True) for m in (model, source))
        assert torch.equal(ours.loss, theirs.loss)
        assert len(ours.hidden_states) == 3
        assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
        assert torch.equal(model(ids, logits_to_keep=2).logits, ours.logits[:, -2:])


def test_parameters_are_copies() -> None:
    source = make_source()
    model = convert_full_attention(source)
    ours, theirs = model.state_dict(), source.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert torch.equal(source.model.norm.weight, torch.ones_like(source.model.norm.weight))


def test_new_mixers_are_nan_and_the_rest_is_copied() -> None:
    source = make_source()
    config = UpcycledConfig.from_source(
        source.config,
        mixers=["full_attention", "latent_attention"],
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    model = build_upcycled(source, config)
    unfilled = {name for name, parameter in model.named_parameters() if parameter.isnan().any()}
    new = {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert unfilled == {f"{name}.weight" for name in new}


def test_a_source_that_does_not_fill_the_model_is_refused() -> None:
    config = UpcycledConfig.from_source(make_source(intermediate_size=32).config)
    with pytest.raises(ValueError, match="differ in name or shape.*mlp"):
        build_upcycled(make_source(), config)


def test_an_upcycled_source_keeps_its_converted_layers() -> None:
    from upcycled_models import make_latent

    first = make_latent(mixers=["latent_attention", "full_attention"])
    config = UpcycledConfig.from_source(first.config, mixers=["latent_attention", "latent_attention"])
    second = build_upcycled(first, config)
    kept, new = second.model.layers[0].self_attn, second.model.layers[1].self_attn
    assert torch.equal(kept.kv_b_proj.weight, first.model.layers[0].self_attn.kv_b_proj.weight)
    assert new.kv_b_proj.weight.isnan().all()
