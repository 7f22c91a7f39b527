"""What an upcycled configuration takes from its source, and what it refuses."""

from __future__ import annotations

import pytest
from source_models import FAMILIES, make_source
from transformers import AutoConfig
from upcycled_models import MLA, YARN

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig

LATENT = ["latent_attention"] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_come_from_the_source(family: str) -> None:
    source = make_source(family).config
    config = UpcycledConfig.from_source(source)
    for name in ("vocab_size", "hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name, None) == getattr(source, name, 16), name
    assert config.rope_parameters == source.rope_parameters
    assert config.rope_parameters is not source.rope_parameters
    assert config.mixers == config.layer_types == ["full_attention"] * 2
    assert (config.attention_bias, config.attention_out_bias) == (family == "qwen2", False)
    assert config.qk_norm == (family == "qwen3")


def test_json_round_trip() -> None:
    config = UpcycledConfig.from_source(make_source().config, mixers=LATENT, **{**MLA, "kv_lora_rank": [8, 24]})
    again = UpcycledConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.layer_value("kv_lora_rank", 1) == 24


def test_evenly_spread_frequencies_by_default() -> None:
    config = UpcycledConfig.from_source(make_source().config, mixers=LATENT, **MLA)
    assert config.kept_frequencies() == [0, 2, 4, 6]
    uneven = UpcycledConfig.from_source(make_source().config, mixers=LATENT, **{**MLA, "qk_rope_head_dim": 6})
    assert uneven.kept_frequencies() == [0, 2, 5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_lora_rank": None}, "needs kv_lora_rank"),
        ({"kv_lora_rank": 0}, "kv_lora_rank of layer 0 is 0"),
        ({"kv_lora_rank": [8]}, "1 ranks for 2 layers"),
        ({"kv_lora_rank": [8, None]}, "kv_lora_rank of layer 1 is None"),
        ({"q_lora_rank": -1}, "q_lora_rank of layer 0 is -1"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7"),
        ({"qk_rope_head_dim": 34}, "qk_rope_head_dim 34 must be even and between 2 and the source's keys together, 32"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim 0"),
        ({"qk_nope_head_dim": -1}, "qk_nope_head_dim -1 must not be negative"),
        ({"v_head_dim": 0}, "must be positive"),
        ({"rope_frequency_indices": [0, 1]}, "4 indices below 8"),
        ({"rope_frequency_indices": [0, 1, 2, 8]}, "4 indices below 8"),
        ({"mixers": ["latent_attention"]}, "1 mixers for 2 layers"),
        ({"qk_norm": True, "qk_latent_layernorm": True}, "cannot be combined with qk_norm"),
        ({"latent_rope_parameters": YARN, "rope_frequency_indices": [0, 1, 2, 3]}, "exclude each other"),
        ({"latent_rope_parameters": {**YARN, "rope_type": "dynamic"}}, "need rope_theta and a rope_type"),
        ({"latent_rope_parameters": {"rope_type": "yarn"}}, "need rope_theta and a rope_type"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "share 3 key/value heads"),
        ({"source_model_type": "gpt2"}, "'gpt2' is not one of llama"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(fields: dict, message: str) -> None:
    base = {**UpcycledConfig.from_source(make_source().config).to_dict(), "mixers": LATENT, **MLA}
    with pytest.raises(Exception, match=message):
        UpcycledConfig(**{**base, **fields})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {}, "'gemma2'; supported: llama, mistral, qwen2, qwen3"),
        ("mistral", {"sliding_window": 64, "max_position_embeddings": 512}, "sliding-window"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}, "sliding-window"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sources_that_blocks_cannot_follow(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UpcycledConfig.from_source(AutoConfig.for_model(family, **changes))
