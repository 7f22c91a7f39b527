"""Sources that are converted or refused, said by the plan; sizes that it promises; scaled rotary embeddings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.mla_upcycling.sources import FAMILIES, logits, make_source, text, tokens
from methods.mla_upcycling.test_mla_card import published
from methods.mla_upcycling.test_mla_exactness import (
    calibrate,
    converted_output,
    inputs,
    relative,
    shared_key_output,
    source_output,
)
from methods.mla_upcycling.test_mla_lossless import LLAMA3, YARN
from methods.mla_upcycling.test_mla_stage import STAGE, TINY, config

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.calibration import attention_layers
from posttrain.models.architecture import cache_bytes_per_token, normalise, parameter_count
from posttrain.pipeline.stage import ArtifactMeta


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts, num_local_experts 8"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts, num_experts 128"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "mixture of experts, n_routed_experts 256"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "soft-capped logits"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "soft-capped logits"),
        ({"model_type": "bloom", "alibi": True}, "ALiBi"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "ALiBi"),
        ({"model_type": "falcon"}, "model_type 'falcon'"),
        ({"model_type": "mistral", "sliding_window": 256}, r"sliding-window layers \(window 256\)"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "sliding-window layers"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}, "sliding-window layers"),
        ({"partial_rotary_factor": 0.5}, "partial rotary embedding"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_an_unsupported_source_is_refused_by_the_plan_with_the_reason(changes: dict, said: str) -> None:
    """The stage's own check, on a description as a hub model's `architecture` may give it."""
    source = {"model": ArtifactMeta("model", {**TINY, **changes})}
    for look in (STAGE.check, STAGE.describe, STAGE.estimate):
        with pytest.raises(RecipeError, match=said) as caught:
            look(config(objective="weight"), source)
        assert caught.value.problems[0].fix


def test_an_upcycled_source_is_refused_by_the_plan() -> None:
    twice = STAGE.describe(config(), {"model": ArtifactMeta("model", normalise(TINY))})
    with pytest.raises(RecipeError, match="upcycled already"):
        STAGE.check(config(), twice)


@pytest.mark.parametrize("settings", [{"qk_rope_head_dim": 7}, {"qk_rope_head_dim": 18}])
def test_an_odd_or_too_wide_rotary_key_is_refused_by_the_plan(settings: dict) -> None:
    with pytest.raises(RecipeError, match="must be even and at most the source's head_dim 16"):
        STAGE.check(config(**settings), {"model": ArtifactMeta("model", TINY)})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotary_plan": "lossless", "kv_ratio": None, "qk_rope_head_dim": None},
        {"q_lora_rank": 24},
        {"rotary_plan": "xeco"},
        {"keep_residual": False},
    ],
    ids=["default", "lossless", "low-rank query", "xeco", "no residual"],
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [16, 24])
def test_the_plan_promises_the_model_that_comes_out(family: str, settings: dict, head_dim: int) -> None:
    source = make_source(family, head_dim=head_dim)
    cfg = config(**{"kv_ratio": 0.75, **settings})
    before = {"model": ArtifactMeta("model", normalise(source.config.to_dict()))}
    promised, estimate = STAGE.describe(cfg, before)["model"].architecture, STAGE.estimate(cfg, before)
    new, _ = mla.upcycle(source, cfg)
    assert normalise(new.config.to_dict()) == promised
    assert estimate.parameters == parameter_count(promised) == sum(weight.numel() for weight in new.parameters())
    assert estimate.cache_bytes_per_token == cache_bytes_per_token(promised)
    with torch.no_grad():
        cache = new(input_ids=tokens(1, 5), use_cache=True).past_key_values
    measured = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert 2 * measured == 5 * estimate.cache_bytes_per_token


def test_statistics_of_normalised_keys_are_counted() -> None:
    cfg = config(objective="activation")
    source = make_source("qwen3")
    meta = {"model": ArtifactMeta("model", normalise(source.config.to_dict())), "calibration": ArtifactMeta("dataset")}
    stats = mla.collect_statistics(source, text())
    held = sum(part.numel() for parts in (stats.second, stats.mean, stats.queries) for part in parts)
    assert STAGE.estimate(cfg, meta).memory["statistics"] == 8 * held == 8 * 2 * (96 * 97 + 2 * 16 * 16)


def test_statistics_are_those_of_the_normalised_keys_and_queries() -> None:
    """Against the source's own modules, run apart; hooks are gone afterwards."""
    source = make_source("qwen3", attention_bias=True)
    stats, block = mla.collect_statistics(source, text()), attention_layers(source)[0]
    with torch.no_grad():
        x = source.model.layers[0].input_layernorm(source.model.embed_tokens(torch.cat(text())))
        keys = block.k_norm(block.k_proj(x).unflatten(-1, (2, 16))).flatten(2)
        queries = block.q_norm(block.q_proj(x).unflatten(-1, (4, 16))).double().flatten(0, 1)
    seen = torch.cat([x, keys], dim=-1).double().flatten(0, 1)
    torch.testing.assert_close(stats.second[0], seen.T @ seen / len(seen), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.mean[0], seen.mean(0), atol=1e-5, rtol=1e-5)
    met = torch.einsum("thd,the->hde", queries, queries).unflatten(0, (2, 2)).sum(1) / len(seen)
    torch.testing.assert_close(stats.queries[0], met, atol=1e-4, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in source.modules())
    assert mla.collect_statistics(make_source("llama"), text()).queries == ()


def test_a_large_mean_of_normalised_keys_costs_no_rank() -> None:
    """Qwen3's normalised keys have a mean without any bias; it adds the same number to all scores of a query."""
    source = make_source("qwen3", attention_bias=True)
    with torch.no_grad():
        for attention in attention_layers(source):
            attention.k_proj.bias.view(2, 2, 8)[:, :, 4:] += 2.0
    cfg = {"kv_lora_rank": 16, "qk_rope_head_dim": 8}
    plan = mla.build_plan(source, cfg, calibrate(source))
    assert plan.shape.latent_bias and plan.layers[0].latent_offset.norm() > 0.1
    x = inputs(source)
    full = mla.build_plan(source, {**cfg, "kv_lora_rank": 56}, calibrate(source))
    best = converted_output(source, full, x)
    without = [replace(layer, latent_offset=torch.zeros_like(layer.latent_offset)) for layer in plan.layers]
    centred = relative(converted_output(source, plan, x), best)
    assert centred < relative(converted_output(source, replace(plan, layers=tuple(without)), x), best)


def test_qwen3_with_biases_is_exact() -> None:
    source = make_source("qwen3", attention_bias=True)
    new, _ = mla.upcycle(source, {"rotary_plan": "lossless", "q_lora_rank": 64}, text())
    assert (logits(new, tokens()) - logits(source, tokens())).abs().max() < 1e-4


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("cfg", [{}, {"rotary_plan": "rorope"}, {"rotary_pairs": "uniform", "shared_key": "mean"}])
def test_card_verification_2_scaled_rotary_embeddings(family: str, rope: dict, cfg: dict) -> None:
    """Full rank against the partial-RoPE model of a scaled source: its frequencies, its attention factor."""
    model = make_source(family, rope_parameters=rope, head_dim=24)
    plan = mla.build_plan(model, {"kv_lora_rank": 2 * 2 * 24 - 12, "qk_rope_head_dim": 12, **cfg}, calibrate(model))
    x = inputs(model)
    converted = converted_output(model, plan, x)
    assert relative(converted, shared_key_output(model, plan, x)) < 1e-4
    assert relative(converted, source_output(model, x)) > 1e-2


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_the_whole_model_turns_as_the_scaled_source(rope: dict) -> None:
    """One KV head with its whole rotary key: logits of the source, at positions where the scaling matters."""
    source = make_source("llama", num_key_value_heads=1, rope_parameters=rope)
    new, _ = mla.upcycle(source, {"kv_lora_rank": 16, "qk_rope_head_dim": 16}, text())
    positions = {"position_ids": torch.arange(180, 212)[None]}
    assert (logits(new, tokens(), **positions) - logits(source, tokens(), **positions)).abs().max() < 1e-4


LLAMA2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
SMOLLM_1_7B = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("model", "baseline", "rank", "rope", "percent", "factor"),
    [
        ("llama32_1b", 1024, 512, 32, 53.1, 1.88),
        ("llama32_1b", 1024, 128, 32, 15.6, 6.4),
        ("llama32_1b", 1024, 64, 32, 9.375, 10.67),
        ("llama32_1b", 1024, 48, 32, 7.8, 12.8),
        ("llama32_3b", 2048, 816, 64, 43.0, 2.33),
        ("llama32_3b", 2048, 128, 64, 9.375, 10.67),
        ("llama31_8b", 2048, 128, 64, 9.375, 10.67),
        ("llama31_8b", 2048, 512, 64, 28.1, 3.6),
        (SMOLLM_1_7B, 4096, 480, 32, 12.5, 8.0),
        (LLAMA2_7B, 8192, 2560 - 64, 64, 31.25, 3.2),
        (LLAMA2_7B, 8192, 1024 - 64, 64, 12.5, 8.0),
        (LLAMA2_7B, 8192, 512, 64, 7.03, 14.22),
        ("qwen25_7b", 1024, 512, 64, 56.3, 1.78),
    ],
)
@pytest.mark.parametrize("plan", ["xeco", "rorope", "paired"])
def test_the_plan_reproduces_the_published_cache_table(
    model: str | dict, baseline: int, rank: int, rope: int, percent: float, factor: float, plan: str
) -> None:
    """Method card, section 5: elements and bytes per token and layer, ratio and factor."""
    arch = published(model) if isinstance(model, str) else normalise(model)
    cfg = mla.MlaUpcycleConfig(kv_lora_rank=rank, qk_rope_head_dim=rope, rotary_plan=plan)
    source = {"model": ArtifactMeta("model", arch)}
    estimate, after = STAGE.estimate(cfg, source), STAGE.describe(cfg, source)["model"].architecture
    layers = arch["num_hidden_layers"]
    assert cache_bytes_per_token(arch) == 2 * layers * baseline
    assert estimate.cache_bytes_per_token == cache_bytes_per_token(after) == 2 * layers * (rank + rope)
    note = next(note for note in estimate.notes if note.startswith("KV cache"))
    assert f"KV cache {rank} + {rope} of {baseline} elements" in note
    ratio = (rank + rope) / baseline
    assert f"ratio {ratio:.4f}, {1 / ratio:.2f}x smaller" in note
    assert 100 * ratio == pytest.approx(percent, abs=0.06) and 1 / ratio == pytest.approx(factor, abs=0.05)


def test_a_rank_wider_than_the_hidden_state_is_said() -> None:
    source = {"model": ArtifactMeta("model", normalise(LLAMA2_7B))}
    cfg = mla.MlaUpcycleConfig(kv_lora_rank=5000, qk_rope_head_dim=64)
    assert "wider than the hidden state, 4096" in " ".join(STAGE.estimate(cfg, source).notes)
