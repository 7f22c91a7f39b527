"""What the packed copy refuses, and how much it holds."""

from __future__ import annotations

import pytest
import torch
from generation_models import LLAMA3, make_upcycled
from source_models import make_source
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from posttrain.errors import StageError
from posttrain.generation import DecodeEngine, Sampling, unsupported

TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def with_adapter():
    model = make_source()
    model.model.layers[0].self_attn.q_proj = nn.Sequential(model.model.layers[0].self_attn.q_proj)
    return model


REFUSED = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2)), "model_type 'gpt2'"),
    "gemma2": (
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**TINY, intermediate_size=32, num_key_value_heads=1, head_dim=16, final_logit_softcapping=5.0)
        ),
        "model_type 'gemma2'",
    ),
    "window": (lambda: make_source("mistral", sliding_window=8), "window 8"),
    "some windows": (
        lambda: make_source("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        "sliding-window",
    ),
    "dynamic": (lambda: make_source(rope_parameters={**LLAMA3, "rope_type": "dynamic"}), "rope_type 'dynamic'"),
    "gelu": (lambda: make_source(hidden_act="gelu"), "hidden_act 'gelu'"),
    "adapter": (with_adapter, r"q_proj is a Sequential \(merge the adapter"),
    "no head": (lambda: make_source().model, "a LlamaModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(StageError, match=message):
        DecodeEngine(model, 2, 16)
    assert unsupported(model)


def test_a_window_beyond_the_context_is_no_window() -> None:
    assert unsupported(make_source("mistral", sliding_window=512)) is None
    assert unsupported(make_source("qwen2", use_sliding_window=False, sliding_window=8)) is None


def test_memory_is_that_of_the_parameters_and_the_cache() -> None:
    model = make_upcycled(mixers=["full_attention", "latent_attention"], kv_lora_rank=[None, 24])
    engine = DecodeEngine(model, 3, 20)
    tables = 20 * 4 * 2 * (16 + 8)  # fp32 cosines and sines, d_h 16 and d_r 8
    parameters = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert engine.weights.bytes() == parameters + tables
    assert engine.decoder.cache_bytes() == 3 * 20 * 4 * (2 * 2 * 16 + 24 + 8)
    assert engine.bytes() == engine.weights.bytes() + engine.decoder.cache_bytes()


def test_shared_weights_are_the_models_own_and_take_no_others() -> None:
    model, rows = make_upcycled(mixers=["full_attention", "latent_attention"]), [[1, 2, 3], [4]]
    shared, own = (DecodeEngine(model, 2, 16, share=share) for share in (True, False))
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    assert shared.weights.embeddings.data_ptr() in parameters
    assert shared.weights.layers[0]["down"].data_ptr() in parameters
    assert not parameters & {tensor.data_ptr() for layer in own.weights.layers for tensor in layer.values()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sampling = Sampling(max_new_tokens=8)
    assert shared.generate(rows, sampling).tokens == own.generate(rows, sampling).tokens
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(StageError, match="shares weights"):
        shared.load(model)


def test_types_can_be_chosen() -> None:
    engine = DecodeEngine(make_source(), 2, 16, dtype=torch.float64)
    assert {tensor.dtype for layer in engine.weights.layers for tensor in layer.values()} == {torch.float64}
