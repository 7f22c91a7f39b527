"""Settings, dimensions and refusals of the conversion: everything that a plan says without weights."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.shape import frequency_indices, resolve_shape
from posttrain.models.architecture import normalise

SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def shape(architecture: dict | None = None, **settings):
    return resolve_shape(normalise({**SMOLLM2, **(architecture or {})}), MlaUpcycleConfig(**settings))


def test_both_budgets_are_refused_with_what_to_type() -> None:
    typed = "e.g. kv_ratio=null kv_lora_rank=64"
    with pytest.raises(ValidationError, match=typed) as caught:
        MlaUpcycleConfig(kv_lora_rank=64, kv_ratio=0.25)
    assert caught.value.error_count() == 1


def test_no_budget_is_refused() -> None:
    with pytest.raises(ValidationError, match="give one of kv_lora_rank and kv_ratio"):
        MlaUpcycleConfig()


def test_a_wrong_type_is_its_own_only_error() -> None:
    with pytest.raises(ValidationError) as caught:
        MlaUpcycleConfig(kv_lora_rank="abc", kv_ratio=0.25)
    assert [error["loc"] for error in caught.value.errors()] == [("kv_lora_rank",)]


@pytest.mark.parametrize(
    "field",
    [{"rotary_pairs": "fastest"}, {"shared_key": "principal"}, {"keep_residual": True}, {"objective": "activation"}],
)
def test_xeco_is_the_published_initialisation_and_nothing_else(field: dict) -> None:
    with pytest.raises(ValidationError, match=f"xeco fixes {next(iter(field))}"):
        MlaUpcycleConfig(kv_lora_rank=16, rotary_plan="xeco", **field)


def test_a_dumped_config_is_accepted_again() -> None:
    for plan in ("paired", "xeco"):
        config = MlaUpcycleConfig(kv_ratio=0.25, rotary_plan=plan)
        assert MlaUpcycleConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("ratio", "multiple", "rope", "rank"),
    [
        (0.167, 16, 16, 48),
        (64 / 384, 16, 16, 48),
        (63.9 / 384, 16, 16, 32),
        (0.25, 16, 32, 64),
        (0.25, 24, 32, 48),
        (0.25, 1, 8, 88),
        (0.5, 64, 64, 128),
        (1.0, 16, 32, 352),
    ],
)
def test_a_ratio_gives_a_rank_rounded_down(ratio: float, multiple: int, rope: int, rank: int) -> None:
    found = shape(kv_ratio=ratio, rank_multiple=multiple, qk_rope_head_dim=rope)
    assert found.kv_lora_rank == rank
    assert found.ratio == (rank + rope) / 384
    assert found.ratio <= ratio + 1e-9


def test_a_ratio_without_room_says_the_smallest() -> None:
    with pytest.raises(RecipeError, match=r"kv_ratio=0\.1250"):
        shape(kv_ratio=0.1, qk_rope_head_dim=32)


@pytest.mark.parametrize(
    ("settings", "largest"),
    [({}, 384 - 32), ({"keep_residual": False}, 384 - 3 * 32), ({"rotary_plan": "xeco"}, 384)],
)
def test_the_largest_rank_is_accepted_and_named(settings: dict, largest: int) -> None:
    assert shape(kv_lora_rank=largest, qk_rope_head_dim=32, **settings).kv_lora_rank == largest
    with pytest.raises(RecipeError, match=f"kv_lora_rank={largest}$"):
        shape(kv_lora_rank=largest + 1, qk_rope_head_dim=32, **settings)


@pytest.mark.parametrize("rope", [15, 66, 128])
def test_an_odd_or_too_wide_rotary_key_is_refused(rope: int) -> None:
    with pytest.raises(RecipeError, match="even and at most"):
        shape(kv_lora_rank=16, qk_rope_head_dim=rope)


def test_xeco_needs_a_width_that_divides() -> None:
    with pytest.raises(RecipeError, match="divides head_dim"):
        shape(kv_lora_rank=16, qk_rope_head_dim=24, rotary_plan="xeco")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {
                "model_type": "upcycled",
                "source_model_type": "llama",
                "mixers": ["full_attention"] * 30,
            },
            "upcycled already",
        ),
    ],
)
def test_an_unsupported_source_is_refused_with_the_reason(change: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        shape(change, kv_lora_rank=16)


def test_paired_rows_are_whole_pairs_of_the_source() -> None:
    settings = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_pairs": "uniform"}
    found = shape({"head_dim": 16}, **settings)
    assert found.rope_frequency_indices == (0, 2, 4, 6)
    assert found.rope_rows == (0, 2, 4, 6, 8, 10, 12, 14)
    assert found.nope_rows == tuple(range(16))
    dropped = shape({"head_dim": 16}, keep_residual=False, **settings)
    assert dropped.nope_rows == (1, 3, 5, 7, 9, 11, 13, 15)
    fastest = shape({"head_dim": 16}, **{**settings, "rotary_pairs": "fastest"})
    assert fastest.rope_frequency_indices == (0, 1, 2, 3)
    assert fastest.rope_rows == (0, 1, 2, 3, 8, 9, 10, 11)


def test_xeco_rows_are_the_last_ones_paired_with_their_neighbours() -> None:
    found = shape({"head_dim": 16}, kv_lora_rank=16, qk_rope_head_dim=8, rotary_plan="xeco")
    assert found.rope_rows == (8, 10, 12, 14, 9, 11, 13, 15)
    assert found.nope_rows == tuple(range(8))
    assert found.rope_frequency_indices == (0, 2, 4, 6)


@pytest.mark.parametrize("rope", range(2, 65, 2))
@pytest.mark.parametrize("choice", ["uniform", "fastest"])
def test_kept_frequencies_are_distinct_and_start_with_the_fastest(rope: int, choice: str) -> None:
    indices = frequency_indices(64, rope, choice)
    assert len(set(indices)) == rope // 2 and indices[0] == 0 and max(indices) < 32
    assert list(indices) == sorted(indices)


@pytest.mark.parametrize(("choice", "power"), [("uniform", 1.0), ("fastest", 0.25)])
def test_kept_frequencies_are_those_of_a_stock_rotary_embedding(choice: str, power: float) -> None:
    theta = 1e5
    source = [theta ** (-2 * index / 64) for index in range(32)]
    stock = [(theta**power) ** (-2 * index / 16) for index in range(8)]
    assert [source[index] for index in frequency_indices(64, 16, choice)] == pytest.approx(stock)


@pytest.mark.parametrize(("family", "bias"), [("llama", False), ("mistral", False), ("qwen2", True)])
def test_the_latent_has_a_bias_where_keys_and_values_have_one(family: str, bias: bool) -> None:
    assert shape({"model_type": family, "sliding_window": None}, kv_lora_rank=16).latent_bias is bias


@pytest.mark.parametrize(
    ("settings", "plan", "rope"),
    [
        ({}, "rorope", 16),
        ({"rotary_plan": None}, "rorope", 16),
        ({"rotary_pairs": "fastest"}, "paired", 32),
        ({"keep_residual": False}, "paired", 32),
        ({"rotary_plan": "rorope", "freqfold": 8}, "rorope", 16),
        ({"preset": "transmla"}, "rorope", 32),
        ({"preset": "activation_aware"}, "rorope", 16),
        ({"rotary_plan": "xeco"}, "xeco", 32),
    ],
)
def test_the_usual_rotary_plan_and_width(settings: dict, plan: str, rope: int) -> None:
    cfg = MlaUpcycleConfig(kv_lora_rank=48, **settings)
    assert cfg.rotary_plan == plan and shape(kv_lora_rank=48, **settings).qk_rope_head_dim == rope


def test_activation_aware_leaves_ranks_to_an_energy() -> None:
    cfg = MlaUpcycleConfig(preset="activation_aware", energy=0.9)
    assert cfg.rank_allocation is None and cfg.objective == "attention"
    assert MlaUpcycleConfig(preset="activation_aware", kv_ratio=0.2).rank_allocation == "water_fill"
