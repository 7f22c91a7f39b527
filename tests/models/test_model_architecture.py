"""Counts by formula against models on the meta device; what is refused, and with which words."""

from __future__ import annotations

import json

import pytest
import torch
from source_models import FAMILIES, make_source
from transformers import AutoConfig, AutoModelForCausalLM
from upcycled_models import VARIANTS, make_latent

from posttrain.errors import RecipeError
from posttrain.models import architecture
from posttrain.models.architecture import SUPPORTED_FAMILIES, normalise, parameter_count
from posttrain.models.upcycled import configuration_upcycled, registry_upcycled
from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM

SHAPES = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
}


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_of_sources_on_the_meta_device(family: str, shape: str) -> None:
    config = make_source(family, **SHAPES[shape]).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        upcycled = UpcycledForCausalLM(UpcycledConfig.from_source(config))
    assert parameter_count(normalise(config.to_dict())) == _parameters(model)
    assert parameter_count(normalise(upcycled.config.to_dict())) == _parameters(upcycled) == _parameters(model)


def test_parameters_of_a_published_size() -> None:
    llama31_8b = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    arch = normalise(llama31_8b)
    assert parameter_count(arch) == 8_030_261_248
    assert architecture.cache_bytes_per_token(arch) == 131_072


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_upcycled_models(variant: str) -> None:
    model = make_latent(**VARIANTS[variant])
    arch = normalise(json.loads(model.config.to_json_string()))
    assert parameter_count(arch) == _parameters(model)
    for layer, block in enumerate(model.model.layers):
        assert architecture.mixer_parameters(arch, layer) == _parameters(block.self_attn)
        assert architecture.layer_parameters(arch, layer) == _parameters(block)


@pytest.mark.parametrize("family", FAMILIES)
def test_normalising_twice_changes_nothing(family: str) -> None:
    arch = normalise(make_source(family).config.to_dict())
    assert normalise(arch) == arch
    assert normalise(json.loads(json.dumps(arch))) == arch
    upcycled = make_latent().config.to_dict()
    assert normalise(normalise(upcycled)) == normalise(upcycled)


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_fields_are_filled_as_transformers_does(family: str) -> None:
    required = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    spoken = {**required, "num_attention_heads": 32, "model_type": family}
    if family == "mistral":
        spoken["sliding_window"] = None
    arch = normalise(spoken)
    config = AutoConfig.for_model(**spoken)
    for name, value in arch.items():
        if hasattr(config, name):
            assert getattr(config, name) in (value, None), name
    with torch.device("meta"):
        assert parameter_count(arch) == _parameters(AutoModelForCausalLM.from_config(config))


def test_old_and_new_spelling_of_rotary_settings() -> None:
    base = {name: 64 for name in ("vocab_size", "hidden_size", "intermediate_size")}
    base |= {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4}
    old = normalise({**base, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    new = normalise({**base, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}})
    assert old == new
    assert normalise(base)["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixture of experts, num_local_experts 8 (model_type 'mixtral')",
        ),
        ({"model_type": "falcon", "alibi": True}, "ALiBi instead of rotary embedding (model_type 'falcon')"),
        ({"position_embedding_type": "alibi"}, "ALiBi"),
        ({"model_type": "gemma2", "final_logit_softcapping": 30.0}, "soft-capped logits (final_logit_softcapping)"),
        ({"model_type": "gemma2"}, "'gemma2'"),
        ({"model_type": None}, "missing"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "mistral"}, "sliding-window layers (window 4096)"),
        ({"model_type": "mistral", "sliding_window": 100}, "sliding-window layers (window 100)"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "upcycled", "source_model_type": "gpt2"}, "source 'gpt2'"),
    ],
    ids=str,
)
def test_unsupported_architectures_name_what_is_supported(changes: dict, words: str) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    assert normalise(config)
    with pytest.raises(RecipeError) as error:
        normalise({**config, **changes})
    assert words in str(error.value)
    assert all(family in str(error.value) for family in SUPPORTED_FAMILIES)


def test_windows_that_never_close_are_full_attention() -> None:
    config = make_source("mistral").config.to_dict()
    assert normalise({**config, "sliding_window": 512}) == normalise(config)


def test_missing_fields_and_wrong_mixers_are_named() -> None:
    with pytest.raises(RecipeError, match="lacks hidden_size, num_hidden_layers"):
        normalise({"model_type": "llama", "vocab_size": 1, "intermediate_size": 1, "num_attention_heads": 1})
    upcycled = make_latent().config.to_dict()
    with pytest.raises(RecipeError, match="known mixers: full_attention, latent_attention"):
        normalise({**upcycled, "mixers": ["latent_attention", "mamba3"]})
    with pytest.raises(RecipeError, match="latent_attention needs kv_lora_rank"):
        normalise({**upcycled, "kv_lora_rank": None})


def test_the_two_lists_of_what_is_known_agree() -> None:
    assert configuration_upcycled.SOURCES == architecture.SUPPORTED_FAMILIES
    assert configuration_upcycled.ROPE_TYPES == architecture.SUPPORTED_ROPE
    assert tuple(registry_upcycled.MIXERS) == architecture.MIXERS
