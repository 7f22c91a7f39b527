"""Parameters and cache bytes of hybrids: the method card's section 8, to the byte, and live caches."""

from __future__ import annotations

import pytest
import torch
from hybrid_models import ORDERS, VARIANTS, make_hybrid
from upcycled_models import token_ids

from posttrain.models.architecture import (
    cache_bytes,
    cache_bytes_per_token,
    cache_elements_per_token,
    cache_ratios,
    cache_state_bytes,
    mixer_parameters,
    normalise,
    parameter_count,
    state_elements,
)

SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "heads": 32},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "head_dim": 128, "heads": 24},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128, "heads": 32},
}
LATENT = {
    "1B": {"kv_lora_rank": 128, "q_lora_rank": 1344, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64},
    "3B": {"kv_lora_rank": 128, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128},
    "8B": {"kv_lora_rank": 160, "q_lora_rank": 2048, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128},
}
ROWS = [  # size, latent layers, baseline B/token, hybrid B/token, ratio %, state elements (M), full-KV tokens
    ("1B", 4, 32_768, 1_280, 3.91, 1.72, 105),
    ("1B", 8, 32_768, 2_560, 7.81, 1.15, 70),
    ("3B", 6, 114_688, 2_304, 2.01, 9.10, 159),
    ("3B", 14, 114_688, 5_376, 4.69, 5.79, 101),
    ("8B", 8, 131_072, 3_584, 2.73, 13.17, 201),
    ("8B", 16, 131_072, 7_168, 5.47, 8.78, 134),
]
STATE = {"1B": 143_360, "3B": 413_696, "8B": 548_864}
HONEST = {("1B", 4): (9.0, 5.2, 4.2, 4.0), ("3B", 6): (9.8, 4.0, 2.5, 2.1), ("8B", 8): (12.6, 5.2, 3.4, 2.9)}


def published(size: str, latent: int | None = None) -> dict:
    """The architecture of the source (None), or of the hybrid with that many latent layers."""
    fields = {**SIZES[size], "vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": size != "8B"}
    fields["num_attention_heads"] = fields.pop("heads")
    if latent is None:
        return normalise({"model_type": "llama", **fields})
    mixers = ["latent_attention"] * latent + ["mamba2"] * (fields["num_hidden_layers"] - latent)
    fields |= {"model_type": "upcycled", "source_model_type": "llama", "mixers": mixers}
    return normalise({**fields, **LATENT[size]})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_section_8_of_the_card(row: tuple) -> None:
    size, latent, baseline, hybrid, ratio, millions, full_tokens = row
    source, arch = published(size), published(size, latent)
    assert cache_bytes_per_token(source) == baseline and cache_bytes_per_token(arch) == hybrid
    states = [state + columns for state, columns in state_elements(arch)]
    layers = arch["num_hidden_layers"]
    assert states == [0] * latent + [STATE[size]] * (layers - latent)
    assert round(sum(states) / 1e6, 2) == millions
    assert cache_state_bytes(arch, 2, state_size=2) == 2 * sum(states)
    assert round(cache_state_bytes(arch, 2, state_size=2) / baseline) == full_tokens
    without, _ = cache_ratios(arch, source, 2048)
    assert round(100 * without, 2) == ratio


@pytest.mark.parametrize("key", HONEST, ids=str)
def test_the_figure_with_the_state(key: tuple[str, int]) -> None:
    source, arch = published(key[0]), published(*key)
    lengths = [2**10 * thousands for thousands in (2, 8, 32, 128)]
    honest = [cache_ratios(arch, source, tokens, state_size=2)[1] for tokens in lengths]
    # The card adds figures that were rounded already.
    assert all(abs(100 * ratio - printed) < 0.06 for ratio, printed in zip(honest, HONEST[key], strict=True)), honest
    # States are fp32 here, which the published figures leave out as well.
    assert all(cache_ratios(arch, source, tokens)[1] > ratio for tokens, ratio in zip(lengths, honest, strict=True))


def test_an_fp32_state_doubles_the_constant() -> None:
    arch = published("8B", 8)
    assert cache_state_bytes(arch, state_size=2) == 26_345_472
    assert cache_state_bytes(arch) == 24 * (524_288 * 4 + 24_576 * 2) == 51_511_296
    assert cache_bytes(arch, 2048) == 2048 * 3_584 + 51_511_296


@pytest.mark.parametrize(
    ("size", "billions"), [("1B", (1.28, 1.27)), ("3B", (3.39, 3.27)), ("8B", (8.38, 8.19))], ids=["1B", "3B", "8B"]
)
def test_published_parameter_totals(size: str, billions: tuple[float, float]) -> None:
    counts = [parameter_count(published(row[0], row[1])) / 1e9 for row in ROWS if row[0] == size]
    assert all(abs(count - printed) < 0.01 for count, printed in zip(counts, billions, strict=True)), counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_the_models(variant: str) -> None:
    model = make_hybrid(ORDERS["state first"], **VARIANTS[variant])
    arch = normalise(model.config.to_dict())
    assert normalise(arch) == arch
    assert parameter_count(arch) == sum(parameter.numel() for parameter in model.parameters())
    for layer, block in enumerate(model.model.layers):
        assert mixer_parameters(arch, layer) == sum(p.numel() for p in block.self_attn.parameters()), layer


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["4 heads share", "own taps", "longer convolution"])
def test_card_verification_6_live_caches(variant: str, dtype: torch.dtype, tokens: int) -> None:
    model = make_hybrid(ORDERS["state first"], **VARIANTS[variant]).to(dtype)
    arch = normalise(model.config.to_dict())
    with torch.no_grad():
        cache = model(token_ids(3, tokens), use_cache=True).past_key_values
    per_token, states = cache_elements_per_token(arch), state_elements(arch)
    assert per_token == [0, 16, 0, 2 * 2 * 8] and states[1] == states[3] == (0, 0)
    total = 0
    for index, layer in enumerate(cache.layers):
        if index in (0, 2):
            held = (layer.recurrent_states[0], layer.conv_states[0])
            assert tuple(tensor.numel() for tensor in held) == tuple(3 * count for count in states[index])
            assert (held[0].dtype, held[1].dtype) == (torch.float32, dtype)
        else:
            held = (layer.keys, layer.values)
            assert sum(tensor.numel() for tensor in held) == 3 * tokens * per_token[index]
        total += sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert total == 3 * cache_bytes(arch, tokens, dtype.itemsize)
