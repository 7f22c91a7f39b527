"""Verifications 4, 8 and 11 of the method card where they need more than one module; the others lie with what they
verify, under names of the same form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from methods.mla_upcycling.sources import FAMILIES, logits, make_source, text, tokens
from transformers import AutoModelForCausalLM

import posttrain.methods.mla_upcycling as mla
from posttrain import paths
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.shape import resolve_shape
from posttrain.methods.mla_upcycling.stage import upcycled_architecture
from posttrain.models.architecture import normalise
from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.rotary_upcycled import UpcycledRotaryEmbedding

FROZEN = json.loads(Path(__file__).with_name("xeco_llama32_1b.json").read_text())
"""Row indices and frequencies of X-EcoMLA's Llama-3.2-1B, computed apart from this code base's and transformers'."""


def published(name: str) -> dict:
    """The architecture of a model in conf/model, normalised."""
    return normalise(yaml.safe_load((paths.shipped("conf") / "model" / f"{name}.yaml").read_text())["architecture"])


def rotary_of(architecture: dict, **settings) -> UpcycledRotaryEmbedding:
    shape = resolve_shape(architecture, mla.MlaUpcycleConfig(kv_lora_rank=64, rotary_plan="xeco", **settings))
    converted = upcycled_architecture(architecture, shape)
    return UpcycledRotaryEmbedding(UpcycledConfig(**{k: v for k, v in converted.items() if k != "model_type"}))


def test_card_verification_4_rows_and_frequencies_of_llama32_1b_are_frozen() -> None:
    arch = published("llama32_1b")
    shape = resolve_shape(arch, mla.MlaUpcycleConfig(kv_lora_rank=64, rotary_plan="xeco"))
    for name in ("nope_rows", "rope_rows", "rope_frequency_indices"):
        assert list(getattr(shape, name)) == FROZEN[name], name
    kept = rotary_of(arch)
    frequencies = kept.inv_freq[kept.selection].double()
    torch.testing.assert_close(frequencies, torch.tensor(FROZEN["source_frequencies"]).double(), rtol=1e-5, atol=0)
    assert kept.attention_scaling == 1


@pytest.mark.parametrize(
    ("settings", "name"), [({"yarn_original_max_position_embeddings": 4096}, "yarn_4096"), ({}, "yarn_8192")]
)
def test_card_verification_4_yarn_of_llama32_1b_is_frozen(settings: dict, name: str) -> None:
    turning = rotary_of(published("llama32_1b"), rotary_scaling="yarn", **settings)
    expected = torch.tensor(FROZEN[name]).double()
    torch.testing.assert_close(turning.latent_inv_freq.double(), expected, rtol=1e-5, atol=0)
    assert turning.latent_scaling == pytest.approx(FROZEN["yarn_factor"])
    eight = rotary_of(published("llama31_8b"), rotary_scaling="yarn", **settings)
    assert eight.latent_scaling == pytest.approx(FROZEN["yarn_factor_8b"])


def test_card_verification_4_written_rows_are_the_ones_of_the_plan() -> None:
    """Queries of a converted block: first the source's nope rows of each head, then its rope rows."""
    source = make_source("llama")
    new, _ = mla.upcycle(source, {"kv_lora_rank": 64, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})
    rows = [*range(8), 8, 10, 12, 14, 9, 11, 13, 15]
    before = source.model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, 16))
    after = new.model.layers[0].self_attn.q_proj.weight.unflatten(0, (4, 16))
    torch.testing.assert_close(after, before[:, rows])
    keys = source.model.layers[0].self_attn.k_proj.weight.unflatten(0, (2, 16)).mean(0)
    torch.testing.assert_close(new.model.layers[0].self_attn.kv_a_proj_with_mqa.weight[64:], keys[rows[8:]])


def test_card_verification_8_xeco_factors_are_those_of_the_repeated_matrix() -> None:
    """The published code decomposes [rep(W_K) ; rep(W_V)]; ours does not repeat, and rebuilds the same rows."""
    source, rank = make_source("llama"), 12
    new, _ = mla.upcycle(source, {"kv_lora_rank": rank, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})
    theirs, ours = source.model.layers[1].self_attn, new.model.layers[1].self_attn
    key, value = (
        part.weight.detach().double().unflatten(0, (2, 16)).repeat_interleave(2, 0)
        for part in (theirs.k_proj, theirs.v_proj)
    )
    u, s, vh = torch.linalg.svd(torch.cat([key.flatten(0, 1), value.flatten(0, 1)]), full_matrices=False)
    rebuilt = (u[:, :rank] * s[:rank] @ vh[:rank]).unflatten(0, (2, 4, 16))
    expected = torch.cat([rebuilt[0, :, :8], rebuilt[1]], dim=1)
    found = ours.kv_b_proj.weight.double() @ ours.kv_a_proj_with_mqa.weight[:rank].double()
    torch.testing.assert_close(found.unflatten(0, (4, 24)), expected, atol=1e-5, rtol=1e-5)


def test_card_verification_11_norms_of_query_and_key_heads_are_carried() -> None:
    source = make_source("qwen3")
    new, _ = mla.upcycle(source, {"rotary_plan": "lossless"}, text())
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() < 1e-4
    for name in ("q_norm", "k_norm"):
        ours, theirs = (getattr(model.model.layers[0].self_attn, name).weight for model in (new, source))
        assert torch.equal(ours, theirs) and ours.std() > 0.1
        with torch.no_grad():
            theirs.copy_(theirs.flip(0))
        assert (logits(new, tokens()) - logits(source, tokens())).abs().max() > 1e-2, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_11_tied_embeddings_stay_tied(family: str, tied: bool, tmp_path: Path) -> None:
    source = make_source(family, tie_word_embeddings=tied)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16, "qk_rope_head_dim": 8}, text())
    new.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for model in (new, again):
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    assert torch.equal(again.model.embed_tokens.weight, source.model.embed_tokens.weight)
    torch.testing.assert_close(logits(again, tokens()), logits(new, tokens()), atol=1e-4, rtol=0)


def test_card_verification_11_mixture_of_experts_is_refused() -> None:
    """Not converted, so no expert can change: the decoder has no router (design.md, section 6)."""
    mixtral = {**published("mistral_7b"), "model_type": "mixtral", "num_local_experts": 8}
    with pytest.raises(RecipeError, match="mixture of experts, num_local_experts 8"):
        resolve_shape(mixtral, mla.MlaUpcycleConfig(kv_lora_rank=64))
