"""The low-rank query: exact at full rank, better with rank, the published factors for xeco; biases and norms kept."""

from __future__ import annotations

import pytest
import torch
from methods.mla_upcycling.sources import FAMILIES, logits, make_source, text, tokens
from methods.mla_upcycling.test_mla_exactness import calibrate, converted_output, inputs, relative, shared_key_output

import posttrain.methods.mla_upcycling as mla
from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.calibration import attention_layers
from posttrain.models.architecture import cache_elements_per_token, normalise, parameter_count

BASE = {"kv_lora_rank": 56, "qk_rope_head_dim": 8}


@pytest.mark.parametrize("objective", ["activation", "attention", "weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_full_query(family: str, objective: str) -> None:
    model = make_source(family)
    plan = mla.build_plan(model, {**BASE, "objective": objective, "q_lora_rank": 64}, calibrate(model))
    x = inputs(model)
    assert relative(converted_output(model, plan, x), shared_key_output(model, plan, x)) < 1e-4
    low = mla.build_plan(model, {**BASE, "objective": objective, "q_lora_rank": 8}, calibrate(model))
    assert relative(converted_output(model, low, x), shared_key_output(model, low, x)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_model_has_the_predicted_parameters_and_the_same_cache(family: str) -> None:
    source = make_source(family)
    full, narrow = (mla.upcycle(source, {**BASE, "q_lora_rank": rank}, text())[0] for rank in (None, 12))
    arch, arch_full = normalise(narrow.config.to_dict()), normalise(full.config.to_dict())
    assert parameter_count(arch) == sum(parameter.numel() for parameter in narrow.parameters())
    assert cache_elements_per_token(arch) == cache_elements_per_token(arch_full)
    assert parameter_count(arch) < parameter_count(arch_full)
    assert torch.isfinite(logits(narrow, tokens())).all()
    exact = mla.upcycle(source, {"rotary_plan": "lossless", "q_lora_rank": 64}, text())[0]
    assert (logits(exact, tokens()) - logits(source, tokens())).abs().max() < 1e-4


def test_more_rank_loses_less_and_the_report_says_so() -> None:
    model = make_source("llama")
    reports = [mla.upcycle(model, {**BASE, "q_lora_rank": rank}, text())[1]["layers"] for rank in (8, 24, 40, 64)]
    for layer in range(2):
        errors = [report[layer]["query_error"] for report in reports]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-6 < 0.1 < errors[0]
        assert [report[layer]["q_lora_rank"] for report in reports] == [8, 24, 40, 64]


def test_xeco_has_singular_values_on_the_down_side_and_nope_before_the_last_rows() -> None:
    """Card section 2: W_DQ = Σ Vᵀ; W_UQ the first d_n rows of U of every head, W_QR its last d_r."""
    source, rank = make_source("llama"), 24
    new, _ = mla.upcycle(source, {**BASE, "q_lora_rank": rank, "rotary_plan": "xeco"}, text())
    ours, theirs = attention_layers(new)[1], attention_layers(source)[1]
    u, s, vh = torch.linalg.svd(theirs.q_proj.weight.double(), full_matrices=False)
    down, up = ours.q_a_proj.weight.double(), ours.q_b_proj.weight.double().unflatten(0, (4, 16))
    signs = torch.sign((down * vh[:rank]).sum(1))
    torch.testing.assert_close(down, signs[:, None] * s[:rank, None] * vh[:rank], atol=1e-5, rtol=1e-4)
    rows = [*range(8), 8, 10, 12, 14, 9, 11, 13, 15]
    torch.testing.assert_close(up, (u[:, :rank] * signs).unflatten(0, (4, 16))[:, rows], atol=1e-5, rtol=1e-4)


def test_the_bias_of_queries_is_not_compressed() -> None:
    source = make_source("qwen2")
    with torch.no_grad():
        for block in attention_layers(source):
            block.q_proj.bias.mul_(100)
    new, _ = mla.upcycle(source, {"rotary_plan": "lossless", "q_lora_rank": 1}, text())
    block, theirs = attention_layers(new)[0], attention_layers(source)[0]
    assert block.q_a_proj.bias is None
    expected = theirs.q_proj.bias.view(4, 16).norm()
    assert block.q_b_proj.bias.norm().item() == pytest.approx(expected.item(), rel=1e-5), "the maps are orthonormal"


def test_attention_weighs_queries_by_their_keys() -> None:
    """Mean square of (q − q̂)·k over queries and keys of the text, apart: less than with plain PCA of the queries."""
    source = make_source("llama", num_key_value_heads=4)
    with torch.no_grad():
        for block in attention_layers(source):
            block.k_proj.weight[:16] *= 1e-2
    statistics, lost = calibrate(source), {}
    block, second = attention_layers(source)[0], statistics.second[0]
    for objective in ("activation", "attention"):
        cfg = {"kv_lora_rank": 64, "qk_rope_head_dim": 8, "q_lora_rank": 16, "objective": objective}
        plan = mla.build_plan(source, cfg, statistics).layers[0]
        query = block.q_proj.weight.detach().double()
        missing = query - plan.query_decode.double() @ plan.query_encode.double() @ query
        heads = zip(missing.split(16), block.k_proj.weight.detach().double().split(16), strict=True)
        lost[objective] = sum(((m @ second @ m.T) * (k @ second @ k.T)).sum().item() for m, k in heads)
    assert lost["attention"] < 0.9 * lost["activation"]


@pytest.mark.parametrize("rank", [65, 1000])
def test_a_rank_beyond_the_hidden_state_is_refused(rank: int) -> None:
    with pytest.raises(RecipeError, match="queries have at most 64 dimensions"):
        mla.upcycle(make_source("llama", num_attention_heads=8), {**BASE, "q_lora_rank": rank})
