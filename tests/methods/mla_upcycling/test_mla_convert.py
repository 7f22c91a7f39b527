"""Whole tiny models through `upcycle`: logits, what is copied, bytes, plans on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from methods.mla_upcycling import reference
from methods.mla_upcycling.sources import FAMILIES, logits, make_source, text, tokens

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.build import SourceLayer
from posttrain.methods.mla_upcycling.calibration import attention_layers
from posttrain.methods.mla_upcycling.convert import layer_tensors
from posttrain.models.architecture import cache_bytes_per_token, cache_elements_per_token, normalise, parameter_count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_one_kv_head_with_its_whole_rotary_key_keeps_the_logits(family: str, tied: bool) -> None:
    source = make_source(family, num_key_value_heads=1, tie_word_embeddings=tied)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16, "qk_rope_head_dim": 16}, text())
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_more_kv_heads_change_the_logits(family: str) -> None:
    source = make_source(family)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 48, "qk_rope_head_dim": 16}, text())
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() > 1e-2


def test_a_rank_wider_than_the_hidden_state_is_allowed() -> None:
    """Merged keys and values of an MHA model have more dimensions than its hidden state; full rank may be asked for."""
    source = make_source("llama", num_attention_heads=8, num_key_value_heads=8)
    low, full = (
        mla.upcycle(source, {"kv_lora_rank": rank, "qk_rope_head_dim": 16}, text())[0] for rank in (64, 2 * 8 * 16 - 16)
    )
    assert full.config.kv_lora_rank == 240 > source.config.hidden_size
    assert (logits(low, tokens()) - logits(full, tokens())).abs().max() < 1e-3


@pytest.mark.parametrize("settings", [{}, {"rotary_plan": "xeco"}, {"keep_residual": False}, {"shared_key": "mean"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_the_formulas_say(family: str, settings: dict) -> None:
    source = make_source(family)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 24, "qk_rope_head_dim": 8, **settings}, text())
    plan = mla.build_plan(source, {"kv_lora_rank": 24, "qk_rope_head_dim": 8, **settings}, None)
    block = attention_layers(new)[0].double()
    x = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.arange(12)[None]
    frequencies = reference.frequencies_of(source)[list(plan.shape.rope_frequency_indices)]
    angles = positions[..., None].double() * frequencies
    embeddings = torch.cat([angles, angles], -1)
    mask = torch.zeros(1, 1, 12, 12, dtype=torch.float64).masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf"))
    with torch.no_grad():
        ours = block(x, (embeddings.cos(), embeddings.sin()), attention_mask=mask)
    ours = ours[0] if isinstance(ours, tuple) else ours
    expected = reference.latent_attention(x, reference.tensors_of(block), plan.shape, frequencies)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_attention_changes_and_the_source_stays(family: str) -> None:
    source = make_source(family)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16}, text())
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    state = new.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    kept = [name for name in before if ".self_attn." not in name]
    assert kept and all(torch.equal(before[name], state[name]) for name in kept)
    for index in range(2):
        name = f"model.layers.{index}.self_attn.o_proj.weight"
        assert torch.equal(before[name], state[name])


def test_card_verification_11_biases_of_queries_keys_and_values_are_carried() -> None:
    source = make_source("qwen2", num_key_value_heads=1)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16, "qk_rope_head_dim": 16}, text())
    with torch.no_grad():
        for block in attention_layers(source):
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(block, name).bias.zero_()
    assert attention_layers(new)[0].kv_a_proj_with_mqa.bias.abs().max() > 1e-3
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() > 1e-2


def test_llama_with_attention_bias_keeps_its_logits() -> None:
    source = make_source("llama", num_key_value_heads=1, attention_bias=True)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16, "qk_rope_head_dim": 16}, text())
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() < 1e-4


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}])
def test_a_source_with_a_rotary_factor_keeps_its_logits(rope: dict) -> None:
    """The residual part has no rotation left to carry the factor; with one KV head and half the pairs it matters."""
    source = make_source("llama", num_key_value_heads=1, rope_parameters={**rope, "rope_theta": 1e4})
    assert source.model.rotary_emb.attention_scaling > 1.1
    source.model.rotary_emb.inv_freq.zero_()  # no turn: then nothing but the factor can make a difference
    new, _ = mla.upcycle(source, {"kv_lora_rank": 24, "qk_rope_head_dim": 8}, text())
    for module in new.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if "inv_freq" in name:
                buffer.zero_()
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() < 1e-4


def test_measured_cache_is_the_predicted_one() -> None:
    source = make_source("llama")
    new, report = mla.upcycle(source, {"kv_ratio": 0.5, "qk_rope_head_dim": 8}, text())
    architecture = normalise(new.config.to_dict())
    assert cache_elements_per_token(architecture) == [16 + 8] * 2
    assert report["kv_ratio"] == 24 / 64
    with torch.no_grad():
        cache = new(input_ids=tokens(3, 20), use_cache=True).past_key_values
    held = {id(item): item for layer in cache.layers for item in vars(layer).values() if isinstance(item, torch.Tensor)}
    assert sum(item.numel() * item.element_size() for item in held.values() if item.dim() == 4) == 3 * 20 * (
        cache_bytes_per_token(architecture, element_size=4)
    )
    assert parameter_count(architecture) == sum(parameter.numel() for parameter in new.parameters())


def attention_error(source: torch.nn.Module, rank: int, stats, objective: str = "activation") -> float:
    """Mean relative error of the blocks' outputs against the partial-RoPE blocks, on the source's own inputs."""
    cfg = {"kv_lora_rank": rank, "qk_rope_head_dim": 8, "objective": objective}
    low, full = (mla.build_plan(source, {**cfg, "kv_lora_rank": r}, stats) for r in (rank, 56))
    frequencies = reference.frequencies_of(source)[list(low.shape.rope_frequency_indices)]
    x = source.model.embed_tokens(tokens()).detach().double()
    errors = []
    for index, block in enumerate(attention_layers(source)):
        ours, best = (
            reference.latent_attention(x, layer_tensors(block, plan.layers[index], plan.shape), plan.shape, frequencies)
            for plan in (low, full)
        )
        errors.append(((ours - best).norm() / best.norm()).item())
    return sum(errors) / len(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_9_a_larger_rank_is_never_worse(family: str) -> None:
    source = make_source(family)
    stats = mla.collect_statistics(source, text())
    errors = [attention_error(source, rank, stats) for rank in (16, 24, 32, 40, 48, 56)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < 0.1 < errors[0]


@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_9_balanced_latents_err_less_in_values_than_plain_ones(family: str, rank: int) -> None:
    """With keys that dominate, as in real models: there plain PCA starves the values."""
    source = make_source(family)
    with torch.no_grad():
        for block in attention_layers(source):
            getattr(block, "k_norm", block.k_proj).weight *= 20
    stats = mla.collect_statistics(source, text())
    balanced, plain = (
        mla.upcycle(source, {"kv_lora_rank": rank, "qk_rope_head_dim": 8, "latent_plan": kind}, stats)[1]["layers"]
        for kind in ("bkv", "pca")
    )
    for ours, theirs in zip(balanced, plain, strict=True):
        assert ours["value_error"] < theirs["value_error"] and ours["alpha"] > 5


def test_the_report_grows_better_with_rank() -> None:
    source = make_source("llama")
    stats = mla.collect_statistics(source, text())
    reports = [mla.upcycle(source, {"kv_lora_rank": rank, "qk_rope_head_dim": 8}, stats)[1] for rank in (16, 32, 56)]
    layers = [report["layers"] for report in reports]
    for index in range(2):
        assert [layer[index]["energy"] for layer in layers] == sorted(layer[index]["energy"] for layer in layers)
        assert layers[-1][index]["rel_error"] < 1e-5 < layers[0][index]["rel_error"] < 1
        assert layers[0][index]["kv_lora_rank"] == 16 and layers[0][index]["layer"] == index


def test_calibration_sees_more_than_the_weights_do() -> None:
    """On inputs that live in few directions a calibrated latent of that rank is nearly exact; the weights' is not."""
    source = make_source("llama")
    source.model.embed_tokens.weight.data = torch.nn.functional.pad(source.model.embed_tokens.weight[:, :8], (0, 56))
    stats = mla.collect_statistics(source, text())
    assert attention_error_first(source, stats) < 0.02 < 0.2 < attention_error_first(source, None)


def attention_error_first(source: torch.nn.Module, stats) -> float:
    plan = mla.build_plan(source, {"kv_lora_rank": 10, "qk_rope_head_dim": 8}, stats)
    weight, _ = SourceLayer.read(attention_layers(source)[0]).keys_values
    layer = plan.layers[0]
    x = source.model.layers[0].input_layernorm(source.model.embed_tokens(tokens())).detach().double().flatten(0, 1)
    values = (x @ weight.T)[:, 32:]
    ours = (x @ weight.T) @ layer.encode.double().T @ layer.decode.double().T[:, -32:]
    return ((ours - values).norm() / values.norm()).item()


def test_a_plan_from_disk_gives_the_same_model(tmp_path: Path) -> None:
    source = make_source("qwen2")
    plan = mla.build_plan(source, {"kv_ratio": 0.5, "qk_rope_head_dim": 8}, mla.collect_statistics(source, text()))
    plan.save(tmp_path)
    again = mla.MlaPlan.load(tmp_path)
    first, second = (mla.apply_plan(source, one).state_dict() for one in (plan, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert json.dumps(again.report()) == json.dumps(plan.report())
    assert json.loads((tmp_path / "conversion.json").read_text()) == json.loads(json.dumps(plan.report()))


def test_per_layer_ranks_of_a_plan_reach_the_model() -> None:
    source = make_source("llama")
    wide, narrow = (mla.build_plan(source, {"kv_lora_rank": rank, "qk_rope_head_dim": 8}) for rank in (32, 16))
    mixed = mla.MlaPlan(wide.shape, (wide.layers[0], narrow.layers[1]), wide.provenance)
    new = mla.apply_plan(source, mixed)
    assert new.config.kv_lora_rank == [32, 16]
    assert torch.isfinite(logits(new, tokens())).all()
    assert mixed.report()["kv_ratio"] == (32 + 16 + 2 * 8) / (2 * 64)


def test_the_same_inputs_give_the_same_plan() -> None:
    source = make_source("llama")
    plans = [mla.build_plan(source, {"kv_lora_rank": 16}, mla.collect_statistics(source, text())) for _ in range(2)]
    assert plans[0].report() == plans[1].report()
    assert all(torch.equal(a.encode, b.encode) for a, b in zip(plans[0].layers, plans[1].layers, strict=True))


def test_statistics_are_those_of_the_block_inputs() -> None:
    source = make_source("llama")
    stats = mla.collect_statistics(source, text())
    with torch.no_grad():
        embedded = source.model.embed_tokens(torch.cat(text()))
        x = source.model.layers[0].input_layernorm(embedded).double().flatten(0, 1)
    assert stats.tokens == len(x) == 2 * 8 * 64
    torch.testing.assert_close(stats.second[0], x.T @ x / len(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.mean[0], x.mean(0), atol=1e-5, rtol=1e-5)
    assert not any(block.k_proj._forward_pre_hooks for block in attention_layers(source))


def test_hooks_go_even_when_calibration_is_stopped() -> None:
    source = make_source("llama")

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mla.collect_statistics(source, text(), stop)
    assert not any(block.k_proj._forward_pre_hooks for block in attention_layers(source))


def test_broken_or_missing_calibration_is_refused() -> None:
    source = make_source("llama")
    with pytest.raises(ValueError, match="at least one sequence"):
        mla.collect_statistics(source, [])
    source.model.embed_tokens.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        mla.collect_statistics(source, [torch.full((1, 4), 5)])
    with pytest.raises(RecipeError, match="needs calibration text"):
        mla.upcycle(make_source("llama"), {"kv_lora_rank": 16, "objective": "activation"})
