"""`rotary_plan=lossless`, the oracle: logits of the source, wherever the tokens stand, for every family and head count.

Card verification 1: merged heads, rotated across heads, with every component kept rotary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from methods.mla_upcycling.sources import FAMILIES, logits, make_source, text, tokens
from methods.mla_upcycling.test_mla_exactness import (
    calibrate,
    converted_output,
    inputs,
    relative,
    shared_key_output,
    source_output,
)

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling import rotary
from posttrain.models.architecture import cache_elements_per_token, normalise, parameter_count

PAD = 258
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


def source(family: str, kv_heads: int = 2, **changes) -> torch.nn.Module:
    return make_source(family, num_attention_heads=8, num_key_value_heads=kv_heads, **changes)


def error(new: torch.nn.Module, old: torch.nn.Module, ids: torch.Tensor, real: torch.Tensor | None = None, **fields):
    difference = (logits(new, ids, **fields) - logits(old, ids, **fields)).abs()
    return (difference if real is None else difference[real]).max()


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_1_lossless_logits_are_those_of_the_source(family: str, kv_heads: int) -> None:
    model = source(family, kv_heads)
    new, report = mla.upcycle(model, {"rotary_plan": "lossless"}, text())
    ids = tokens()
    assert error(new, model, ids) < 1e-4
    assert error(new, model, ids, position_ids=torch.arange(300, 332)[None]) < 1e-4
    arch = normalise(new.config.to_dict())
    assert cache_elements_per_token(arch) == [2 * kv_heads * 16] * 2 and report["kv_ratio"] == 1
    assert parameter_count(arch) == sum(parameter.numel() for parameter in new.parameters())
    shorter = mla.upcycle(model, {"rotary_plan": "lossless", "kv_lora_rank": 8}, text())[0]
    assert error(shorter, model, ids) > 1e-2, "the latent of the values does not matter"


@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_1_lossless_left_padded(family: str) -> None:
    model, lengths = source(family), (6, 17, 20)
    new, _ = mla.upcycle(model, {"rotary_plan": "lossless"}, text())
    ids, mask = tokens(3, 20), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, 20 - length :] = 1
    ids = ids.masked_fill(mask == 0, PAD)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    fields = {"attention_mask": mask, "position_ids": positions}
    assert error(new, model, ids, mask.bool(), **fields) < 1e-4
    alone = logits(model, ids[:1, 14:])
    assert (logits(new, ids, **fields)[0, 14:] - alone[0]).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_card_verification_1_lossless_packed(family: str) -> None:
    model, lengths = source(family), (4, 6, 3)
    new, _ = mla.upcycle(model, {"rotary_plan": "lossless"}, text())
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    apart = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    assert (logits(new, ids, position_ids=positions) - apart).abs().max() < 1e-4
    assert (logits(new, ids) - apart).abs().max() > 1e-2, "documents do not differ from one long row"


@pytest.mark.parametrize("objective", ["activation", "attention", "weight"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_objective_is_exact_at_full_rank(family: str, objective: str) -> None:
    model = source(family)
    new, _ = mla.upcycle(model, {"rotary_plan": "lossless", "objective": objective}, text())
    assert error(new, model, tokens()) < 1e-4


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scaled_rotary_embeddings_stay_those_of_the_source(family: str, rope: dict) -> None:
    model = source(family, rope_parameters=rope)
    new, _ = mla.upcycle(model, {"rotary_plan": "lossless"}, text())
    assert error(new, model, tokens(), position_ids=torch.arange(200, 232)[None]) < 1e-4
    plain = source(family)
    assert error(plain, model, tokens()) > 1e-2, "the scaling makes no difference"


@pytest.mark.parametrize("head_dim", [12, 32])
def test_heads_that_do_not_divide_the_hidden_size(head_dim: int) -> None:
    model = source("llama", head_dim=head_dim)
    assert head_dim != 64 // 8
    new, _ = mla.upcycle(model, {"rotary_plan": "lossless"}, text())
    assert error(new, model, tokens()) < 1e-4


def test_card_verification_1_merging_heads_alone() -> None:
    """Selectors in place of the rotations across heads: the same scores, one key of width G·d_h."""
    model, kv_heads = source("qwen2", 4), 4
    plan = mla.build_plan(model, {"rotary_plan": "lossless"}, calibrate(model))
    falling = torch.diag(torch.arange(kv_heads, 0, -1).double().repeat_interleave(16))
    selectors = [part.float() for part in rotary.folded_maps(falling, kv_heads, fold=1, kept=kv_heads)]
    assert all(set(part.unique().tolist()) == {0.0, 1.0} for part in selectors)
    layers = tuple(replace(layer, rotary_key=selectors[0], rotary_query=selectors[1]) for layer in plan.layers)
    merged, x = replace(plan, layers=layers), inputs(model)
    assert relative(converted_output(model, merged, x), source_output(model, x)) < 1e-5
    assert not torch.equal(selectors[0], plan.layers[0].rotary_key)


@pytest.mark.parametrize("ratio", [0.037, 1.0, 41.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_card_verification_1_any_balance_is_exact_at_full_rank(family: str, ratio: float) -> None:
    model = source(family)
    cfg = {"kv_lora_rank": 2 * 2 * 16 - 8, "qk_rope_head_dim": 8, "balance_ratio": ratio}
    plan = mla.build_plan(model, cfg, calibrate(model))
    x, layer = inputs(model), plan.layers[0]
    assert relative(converted_output(model, plan, x), shared_key_output(model, plan, x)) < 1e-5
    assert layer.summary["alpha"] == pytest.approx(
        ratio * mla.build_plan(model, {**cfg, "balance_ratio": 1.0}, calibrate(model)).layers[0].summary["alpha"]
    )


def test_what_lossless_fixes_is_refused() -> None:
    for field in ({"rotary_pairs": "uniform"}, {"shared_key": "mean"}, {"keep_residual": True}):
        with pytest.raises(ValueError, match=f"lossless fixes {next(iter(field))}"):
            mla.MlaUpcycleConfig(rotary_plan="lossless", **field)
    with pytest.raises(RecipeError, match="keeps every key rotary: qk_rope_head_dim is 32, not 16"):
        mla.upcycle(source("llama"), {"rotary_plan": "lossless", "qk_rope_head_dim": 16})
    with pytest.raises(RecipeError, match="rank 33 is larger than possible"):
        mla.upcycle(source("llama"), {"rotary_plan": "lossless", "kv_lora_rank": 33})


def test_a_budget_of_the_oracle_counts_its_rotary_keys() -> None:
    report = mla.upcycle(source("llama"), {"rotary_plan": "lossless", "kv_ratio": 0.75, "rank_multiple": 4})[1]
    assert report["kv_ratio"] == 0.75 and [layer["kv_lora_rank"] for layer in report["layers"]] == [16, 16]
