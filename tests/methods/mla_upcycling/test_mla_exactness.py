"""Where the conversion is exact, it must be; where it is not, it must not be; float64, positions > 0."""

from __future__ import annotations

import pytest
import torch
from methods.mla_upcycling import reference
from methods.mla_upcycling.sources import FAMILIES, make_source

from posttrain.methods.mla_upcycling.build import build_plan
from posttrain.methods.mla_upcycling.calibration import attention_layers, collect_statistics
from posttrain.methods.mla_upcycling.convert import layer_tensors

STEPS = 32


def inputs(model: torch.nn.Module, steps: int = STEPS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, steps, model.config.hidden_size, generator=generator, dtype=torch.float64)


def calibrate(model: torch.nn.Module):
    generator = torch.Generator().manual_seed(4)
    return collect_statistics(model, [torch.randint(0, 256, (8, 64), generator=generator)])


def source_output(model: torch.nn.Module, x: torch.Tensor, layer: int = 0) -> torch.Tensor:
    tensors, config = reference.tensors_of(attention_layers(model)[layer]), model.config
    heads = config.num_attention_heads, config.num_key_value_heads
    factor = model.model.rotary_emb.attention_scaling
    return reference.source_attention(x, tensors, *heads, reference.frequencies_of(model), factor)


def converted_output(model: torch.nn.Module, plan, x: torch.Tensor, layer: int = 0) -> torch.Tensor:
    factor = model.model.rotary_emb.attention_scaling
    tensors = layer_tensors(attention_layers(model)[layer], plan.layers[layer], plan.shape, factor)
    frequencies = reference.frequencies_of(model)[list(plan.shape.rope_frequency_indices)]
    return reference.latent_attention(x, tensors, plan.shape, frequencies, factor)


def shared_key_output(model: torch.nn.Module, plan, x: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """The source's block where only what the plan's rotary key carries still turns: what full rank must be equal to."""
    return reference.shared_rotary_attention(
        x,
        reference.tensors_of(attention_layers(model)[layer]),
        plan.shape.heads,
        plan.shape.kv_heads,
        reference.frequencies_of(model)[list(plan.shape.rope_frequency_indices)],
        plan.layers[layer].rotary_key,
        plan.layers[layer].rotary_query,
        model.model.rotary_emb.attention_scaling,
    )


def direction_of(plan, layer: int) -> torch.Tensor:
    """Of a `paired` plan: the weights of the KV heads in every kept pair, [d_r/2, G]."""
    indices = list(plan.shape.rope_frequency_indices)
    key = plan.layers[layer].rotary_key[: len(indices)].unflatten(1, (plan.shape.kv_heads, -1))
    return torch.stack([key[number, :, pair] for number, pair in enumerate(indices)])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("objective", ["activation", "attention", "weight"])
def test_card_verification_3_one_kv_head_and_full_rotary_key_is_the_source(family: str, objective: str) -> None:
    model = make_source(family, num_key_value_heads=1)
    plan = build_plan(model, {"kv_lora_rank": 16, "qk_rope_head_dim": 16, "objective": objective}, calibrate(model))
    x = inputs(model)
    assert relative(converted_output(model, plan, x), source_output(model, x)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kv_heads", [2, 4, 8])
@pytest.mark.parametrize("shared_key", ["principal", "mean"])
def test_card_verification_3_several_kv_heads_are_not_the_source(family: str, kv_heads: int, shared_key: str) -> None:
    """Guards against an oracle that never exercises RoPE."""
    model = make_source(family, num_attention_heads=8, num_key_value_heads=kv_heads)
    rank = 2 * kv_heads * 16 - 16
    cfg = {"kv_lora_rank": rank, "qk_rope_head_dim": 16, "shared_key": shared_key}
    plan = build_plan(model, cfg, calibrate(model))
    x = inputs(model)
    assert relative(converted_output(model, plan, x), source_output(model, x)) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("rope_dim", "objective", "pairs"),
    [
        (4, "activation", "fastest"),
        (6, "activation", "uniform"),
        (8, "attention", "fastest"),
        (8, "weight", "uniform"),
        (16, "activation", "fastest"),
    ],
)
def test_card_verification_2_full_rank_is_the_partial_rope_model(
    family: str, kv_heads: int, rope_dim: int, objective: str, pairs: str
) -> None:
    model = make_source(family, num_attention_heads=max(4, kv_heads), num_key_value_heads=kv_heads)
    rank = 2 * kv_heads * 16 - rope_dim
    cfg = {"kv_lora_rank": rank, "qk_rope_head_dim": rope_dim, "objective": objective, "rotary_pairs": pairs}
    plan = build_plan(model, cfg, calibrate(model))
    x, layer = inputs(model), 1
    expected = reference.partial_rope_attention(
        x,
        reference.tensors_of(attention_layers(model)[layer]),
        model.config.num_attention_heads,
        kv_heads,
        reference.frequencies_of(model),
        direction_of(plan, layer),
        list(plan.shape.rope_frequency_indices),
    )
    assert relative(converted_output(model, plan, x, layer), expected) < 1e-4


@pytest.mark.parametrize("shared_key", ["principal", "mean"])
def test_without_any_turn_nothing_is_lost(shared_key: str) -> None:
    """At full rank the decomposition of the key is complete, whatever the number of KV heads and the shared key."""
    model = make_source("qwen2")
    model.model.rotary_emb.inv_freq.zero_()
    cfg = {"kv_lora_rank": 56, "qk_rope_head_dim": 8, "shared_key": shared_key}
    x = inputs(model)
    converted = converted_output(model, build_plan(model, cfg, calibrate(model)), x)
    assert relative(converted, source_output(model, x)) < 1e-5


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_discarding_the_residual_is_exact_only_with_one_kv_head(kv_heads: int) -> None:
    model = make_source("llama", num_key_value_heads=kv_heads)
    cfg = {"kv_lora_rank": kv_heads * 16, "qk_rope_head_dim": 16, "keep_residual": False}
    x = inputs(model)
    plan = build_plan(model, cfg, calibrate(model))
    assert plan.shape.qk_nope_head_dim == 0
    error = relative(converted_output(model, plan, x), source_output(model, x))
    assert error < 1e-5 if kv_heads == 1 else error > 1e-2


def test_card_verification_4_xeco_scores_are_exact_at_position_zero_with_one_kv_head_only() -> None:
    """The scores, since at a single position the softmax hides them; both rotations are the identity there."""
    errors = {}
    for kv_heads in (1, 2):
        model = make_source("llama", num_key_value_heads=kv_heads)
        plan = build_plan(model, {"kv_lora_rank": 32 * kv_heads, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})
        x, shape = inputs(model, steps=8), plan.shape
        tensors = layer_tensors(attention_layers(model)[0], plan.layers[0], shape)
        q = reference.affine(x, tensors, "q_proj").unflatten(-1, (4, 16)).transpose(1, 2)
        down = reference.affine(x, tensors, "kv_a_proj_with_mqa")
        up = reference.affine(down[..., :-8], tensors, "kv_b_proj").unflatten(-1, (4, 8 + 16)).transpose(1, 2)
        keys = torch.cat([up[..., :8], down[:, None, :, -8:].expand(-1, 4, -1, -1)], dim=-1)
        source = reference.tensors_of(attention_layers(model)[0])
        source_q, source_k, source_v = reference.source_heads(x, source, 4, kv_heads)
        errors[kv_heads] = relative(q @ keys.mT, source_q @ source_k.mT)
        assert relative(up[..., 8:], source_v) < 1e-5
    assert errors[1] < 1e-5 < 1e-2 < errors[2]


def test_card_verification_4_xeco_differs_at_other_positions() -> None:
    model = make_source("llama", num_key_value_heads=1)
    plan = build_plan(model, {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})
    x = inputs(model)
    assert relative(converted_output(model, plan, x), source_output(model, x)) > 1e-2


def test_a_rotary_factor_is_kept_in_rows_that_lose_the_rotation() -> None:
    model = make_source("llama")
    plan = build_plan(model, {"kv_lora_rank": 56, "qk_rope_head_dim": 8})
    attention = attention_layers(model)[0]
    plain, scaled = (
        layer_tensors(attention, plan.layers[0], plan.shape, factor)["q_proj.weight"] for factor in (1.0, 1.5)
    )
    ratio = (scaled / plain).unflatten(0, (4, 24))
    torch.testing.assert_close(ratio[:, :16], torch.full_like(ratio[:, :16], 2.25))
    torch.testing.assert_close(ratio[:, 16:], torch.ones_like(ratio[:, 16:]))


def test_a_large_constant_in_position_free_keys_costs_no_rank() -> None:
    """It adds the same number to all scores of a query; Qwen2 has such biases, and a latent of this rank is scarce."""
    outputs = []
    for constant in (0.0, 500.0):
        model = make_source("qwen2")
        with torch.no_grad():
            for attention in attention_layers(model):
                attention.k_proj.bias.view(2, 2, 8)[:, :, 4:] += constant  # pairs 4..7 lose their rotation
        settings = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_plan": "paired"}
        plan = build_plan(model, settings, calibrate(make_source("qwen2")))
        outputs.append(converted_output(model, plan, inputs(model)))
    assert relative(outputs[1], outputs[0]) < 1e-4
