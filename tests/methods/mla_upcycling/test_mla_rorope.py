"""RoRoPE with FreqFold, latent plans and plans that are compared: what is exact, what is not, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from methods.mla_upcycling import reference
from methods.mla_upcycling.sources import make_source
from methods.mla_upcycling.test_mla_exactness import calibrate, converted_output, inputs, relative, source_output
from pydantic import ValidationError

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling import rotary
from posttrain.methods.mla_upcycling.calibration import attention_layers

WIDTH = 16


def key_moment(kv_heads: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(kv_heads * WIDTH, kv_heads * WIDTH, generator=generator, dtype=torch.float64)
    return root @ root.T


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_card_verification_1_rorope_that_keeps_every_component_gives_the_scores_of_the_source(
    kv_heads: int,
) -> None:
    """The merged key, rotated across heads pair by pair, commutes with RoPE."""
    key_map, query_map = rotary.folded_maps(key_moment(kv_heads), kv_heads, fold=1, kept=kv_heads)
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, kv_heads, 12, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    frequencies, positions = 0.5 ** torch.arange(WIDTH // 2).double(), torch.arange(3, 15).double()
    turning = frequencies.repeat_interleave(kv_heads)
    shared = k.transpose(1, 2).flatten(2) @ key_map.T
    for head in range(kv_heads):
        mine = q[:, head] @ query_map[head].T
        ours = reference.turn(mine, turning, positions) @ reference.turn(shared, turning, positions).mT
        source = (reference.turn(part[:, head], frequencies, positions) for part in (q, k))
        query, key = source
        torch.testing.assert_close(ours, query @ key.mT, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("fold", "kept"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_card_verification_8_folded_maps_are_orthonormal_and_keep_the_most_energy(fold: int, kept: int) -> None:
    """U Uᵀ = I; what is kept falls with every further component, and U's beats any other."""
    moment = key_moment(2)
    key_map, query_map = rotary.folded_maps(moment, 2, fold, kept)
    torch.testing.assert_close(key_map @ key_map.T, torch.eye(len(key_map), dtype=torch.float64))
    torch.testing.assert_close(rotary.carried_rows(query_map), key_map.T)
    more = rotary.folded_maps(moment, 2, fold, kept + 1)[0].unflatten(0, (2, WIDTH // 2 // fold, kept + 1))
    energies = ((more @ moment) * more).sum(-1).sum(0)
    assert (energies[:, :-1] >= energies[:, 1:]).all()
    other = rotary.folded_maps(key_moment(2, seed=5), 2, fold, kept)[0]
    assert ((key_map @ moment) * key_map).sum() > ((other @ moment) * other).sum()


def test_rorope_without_folding_is_paired_with_every_pair() -> None:
    model, text = make_source("llama"), {"kv_lora_rank": 24, "qk_rope_head_dim": 16}
    statistics = calibrate(model)
    plans = [mla.build_plan(model, {**text, "rotary_plan": kind}, statistics) for kind in ("paired", "rorope")]
    x = inputs(model)
    assert relative(*(converted_output(model, plan, x) for plan in plans)) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("kv_heads", "rope_dim", "fold"), [(1, 16, None), (2, 8, None), (2, 4, 4), (4, 4, 8)])
def test_card_verification_2_full_rank_is_the_model_with_that_shared_rotary_key(
    family: str, kv_heads: int, rope_dim: int, fold: int | None
) -> None:
    """With one KV head that is the source; with more it is not (negative)."""
    model = make_source(family, num_key_value_heads=kv_heads)
    cfg = {"kv_lora_rank": 2 * kv_heads * WIDTH - rope_dim, "qk_rope_head_dim": rope_dim, "freqfold": fold}
    plan = mla.build_plan(model, {**cfg, "rotary_plan": "rorope"}, calibrate(model))
    assert plan.shape.rope_frequency_indices == tuple(range(0, WIDTH // 2, WIDTH // rope_dim))
    x, layer = inputs(model), plan.layers[1]
    expected = reference.shared_rotary_attention(
        x,
        reference.tensors_of(attention_layers(model)[1]),
        model.config.num_attention_heads,
        kv_heads,
        reference.frequencies_of(model)[:: WIDTH // rope_dim],
        layer.rotary_key,
        layer.rotary_query,
    )
    converted = converted_output(model, plan, x, 1)
    assert relative(converted, expected) < 1e-4
    error = relative(converted, source_output(model, x, 1))
    assert error < 1e-4 if kv_heads == 1 else error > 1e-2


def test_latent_plans_differ_in_balance_only() -> None:
    model = make_source("llama")
    with torch.no_grad():
        for attention in attention_layers(model):
            attention.k_proj.weight *= 20
    statistics, base = calibrate(model), {"kv_lora_rank": 16, "qk_rope_head_dim": 8}
    found = {
        name: mla.build_plan(model, {**base, **cfg}, statistics).layers[0].summary
        for name, cfg in {
            "bkv": {"latent_plan": "bkv"},
            "half": {"latent_plan": "bkv", "balance_ratio": 0.5},
            "pca": {"latent_plan": "pca"},
            "svd": {"latent_plan": "svd"},
        }.items()
    }
    assert found["pca"]["alpha"] == found["svd"]["alpha"] == 1
    assert found["half"]["alpha"] == pytest.approx(found["bkv"]["alpha"] / 2) and found["bkv"]["alpha"] > 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latent_plan": "svd", "objective": "activation"}, "decomposes weights"),
        ({"latent_plan": "pca", "objective": "weight"}, "decomposes calibration text"),
        ({"latent_plan": "pca", "balance_ratio": 2.0}, "belongs to latent_plan=bkv"),
        ({"freqfold": 2, "rotary_plan": "paired"}, "belongs to rotary_plan=rorope"),
        ({"rotary_plan": "rorope", "keep_residual": False}, "fixes keep_residual"),
        ({"rotary_plan": "xeco", "latent_plan": "bkv"}, "fixes latent_plan"),
    ],
)
def test_contradictions_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        mla.MlaUpcycleConfig(kv_lora_rank=16, **settings)


@pytest.mark.parametrize("fold", [1, 3, 16])
def test_a_fold_that_does_not_fit_is_refused(fold: int) -> None:
    with pytest.raises(RecipeError, match=f"freqfold {fold}"):
        cfg = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_plan": "rorope", "freqfold": fold}
        mla.build_plan(make_source("llama"), cfg)


def test_pca_without_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="calibration text"):
        mla.build_plan(make_source("llama"), {"kv_lora_rank": 16, "latent_plan": "pca"})


def test_a_saved_plan_replays_to_equal_weights_and_differs_from_another(tmp_path: Path) -> None:
    model = make_source("qwen2")
    cfg = {"kv_lora_rank": 24, "qk_rope_head_dim": 8, "rotary_plan": "rorope", "freqfold": 4}
    plan = mla.build_plan(model, cfg, calibrate(model))
    plan.save(tmp_path)
    again = mla.MlaPlan.load(tmp_path)
    assert plan.diff(again) == []
    first, second = (mla.apply_plan(model, which).state_dict() for which in (plan, again))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    lines = plan.diff(mla.build_plan(model, {**cfg, "freqfold": 2}, calibrate(model)))
    assert "config.freqfold: 4 → 2" in lines
    assert any(line.startswith("layers.0.rotary_key: relative distance") for line in lines)
    wider = plan.diff(mla.build_plan(model, {**cfg, "kv_lora_rank": 32}, calibrate(model)))
    assert "shape.kv_lora_rank: 24 → 32" in wider and any("encode: shape" in line for line in wider)
