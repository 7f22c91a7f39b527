"""Hybrids of states and full attention are the same function in stock FalconH1 classes: every form let through.

Whole exports with their certificates: test_export_falcon_files.py.
"""

from __future__ import annotations

import pytest
import torch
from methods.export.export_world import LLAMA3
from models.hybrid_models import make_hybrid
from transformers import FalconH1ForCausalLM

from posttrain.errors import RecipeError
from posttrain.methods.export import verify
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.falcon import to_falcon
from posttrain.methods.export.targets import holdings
from posttrain.models.architecture import normalise

MIXED, STATES = ("mamba2", "full_attention", "mamba2"), ("mamba2", "mamba2")
FORMS = {
    "4 heads share": {},
    "2 heads share": {"kv_heads": 4},
    "none share": {"kv_heads": 8},
    "own taps": {"mamba_repeat_before_conv": True},
    "longer convolution": {"mamba_conv_kernel": 6},
    "no convolution": {"mamba_conv_kernel": 1},
    "no convolution, bias on in_proj": {"mamba_conv_kernel": 1, "mamba_bias": True},
    "gate without norm": {"mamba_norm": False},
    "bias on out_proj": {"mamba_out_bias": True},
    "heads wider than the model": {"head_dim": 12},
    "mistral": {"family": "mistral"},
    "qwen2, biases on attention alone": {"family": "qwen2", "mamba_bias": False},
    "biases on attention and MLP": {
        "of_source": {"attention_bias": True, "mlp_bias": True},
        "mamba_bias": False,
        "mamba_out_bias": False,
    },
    "bias on the attention's output alone": {"attention_out_bias": True, "mamba_out_bias": False},
    "another epsilon": {"rms_norm_eps": 1e-2},
    "embeddings apart": {"tie_word_embeddings": False},
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3,
    "another theta": {"rope_type": "default", "rope_theta": 5e5},
}


def error(model, stock, ids: torch.Tensor) -> float:
    """Relative error of the stock model's logits, plain, and of left-padded prompts where `ids` are prompts."""
    with torch.no_grad():
        found = [verify.errors(model(ids).logits, stock(ids).logits)["relative"]]
        if ids.shape == (verify.PROMPTS, verify.LENGTH):
            found.append(verify.errors(verify.of_padded(model, ids), verify.of_padded(stock, ids))["relative"])
    return max(found)


@pytest.mark.parametrize("mixers", [MIXED, STATES], ids=["mixed", "states alone"])
@pytest.mark.parametrize("form", FORMS)
def test_the_stock_model_gives_the_same(form: str, mixers: tuple[str, ...]) -> None:
    model = make_hybrid(mixers, **FORMS[form])
    stock = to_falcon(model)
    assert type(stock) is FalconH1ForCausalLM
    assert error(model, stock, verify.prompt_ids(300, 1)) <= 1e-5
    predicted = holdings(normalise(model.config.to_dict()), ExportConfig(to="falcon_h1"))
    assert predicted.parameters == sum(parameter.numel() for parameter in stock.parameters())


def test_in_deep_models_it_differs_no_more_than_the_model_from_itself() -> None:
    """24 layers amplify rounding; computed row by row, a model of states gives the same bits."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.02}
    model, ids = make_hybrid(("mamba2",) * 24, of_source=wide, head_dim=32), verify.prompt_ids(300, 1)
    with torch.no_grad():
        noise = verify.noise(model, ids, model(ids, use_cache=False).logits)
    assert 1e-5 < noise < 1e-2
    assert error(model, to_falcon(model), ids) <= 2 * noise


@pytest.mark.parametrize("rope", ROPES)
def test_attention_turns_as_before(rope: str) -> None:
    model = make_hybrid(MIXED, rope_parameters=ROPES[rope], max_position_embeddings=64)
    ids = torch.randint(0, 300, (2, 100), generator=torch.Generator().manual_seed(2))
    assert error(model, to_falcon(model), ids) <= 1e-5


def test_texts_longer_than_a_chunk_of_the_stock_scan() -> None:
    model = make_hybrid(MIXED)
    stock = to_falcon(model)
    ids = torch.randint(0, 300, (1, 2 * stock.config.mamba_chunk_size + 40), generator=torch.Generator().manual_seed(3))
    assert error(model, stock, ids) <= 1e-5


def test_a_half_that_no_layer_uses_is_zero_and_gets_no_gradient() -> None:
    stock = to_falcon(make_hybrid(MIXED))
    stock(verify.prompt_ids(300, 1)).logits.square().mean().backward()
    for index, mixer in enumerate(MIXED):
        layer = stock.model.layers[index]
        unused, used = (layer.self_attn, layer.mamba) if mixer == "mamba2" else (layer.mamba, layer.self_attn)
        assert all(not parameter.any() and not parameter.grad.any() for parameter in unused.parameters())
        assert all(parameter.any() for parameter in used.parameters())


def test_states_alone_cache_the_keys_of_one_head() -> None:
    stock = to_falcon(make_hybrid(STATES))
    cache = stock(verify.prompt_ids(300, 1), use_cache=True).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(4, 1, 32, 8)] * 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mixers": ("mamba2", "latent_attention", "full_attention")}, r"no latent attention \(layers \[1\]\)"),
        ({"mixers": ("full_attention",)}, "no layer carries a state"),
        ({"family": "qwen3"}, "no QK-norm on its attention heads, nor on B and C"),
        ({"mamba_conv_activation": False}, "none follows this model's"),
        ({"hidden_act": "gelu"}, "one activation for MLP and convolution, this model gelu and silu"),
        ({"family": "qwen2"}, "into the first 3 tokens of every left-padded text"),
        ({"mamba_bias": True, "mamba_conv_kernel": 2}, "into the first 1 tokens"),
    ],
)
def test_what_the_class_lacks_is_refused(fields: dict, said: str) -> None:
    model = make_hybrid(**{"mixers": MIXED, **fields})
    with pytest.raises(RecipeError, match=said) as caught:
        to_falcon(model)
    assert "to=native" in str(caught.value)
