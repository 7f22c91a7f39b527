"""What the packed copy refuses, and how much it holds."""

from __future__ import annotations

import pytest
import torch
from generation_models import LLAMA3, full_logprobs, generate, make_upcycled, prompts
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


def with_lora(make, target: str):
    """A model whose own modules an adapter was put into, as `PeftModel.get_base_model` gives it."""
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(LoraConfig(target_modules=[target]), make())


def with_head_bias():
    model = make_source(tie_word_embeddings=False)
    model.lm_head.bias = nn.Parameter(torch.ones(300))
    return model


def with_weight(name: str, weight: torch.Tensor):
    model = make_source(tie_word_embeddings=False)
    model.get_submodule(name).weight = nn.Parameter(weight)
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
    "adapter": (with_adapter, r"q_proj is a torch.nn.modules.container.Sequential \(merge the adapter"),
    "adapter of keys": (
        lambda: with_lora(make_upcycled, "kv_a_proj_with_mqa"),
        r"kv_a_proj_with_mqa is a peft\.tuners\.lora\.layer\.Linear",
    ),
    "adapter of the head": (
        lambda: with_lora(lambda: make_source(tie_word_embeddings=False), "lm_head"),
        r"lm_head is a peft\.tuners\.lora\.layer\.Linear",
    ),
    "adapter of embeddings": (
        lambda: with_lora(make_source, "embed_tokens"),
        r"input embedding is a peft\.tuners\.lora\.layer\.Embedding",
    ),
    "bias of the head": (with_head_bias, "a bias of lm_head"),
    "weights elsewhere": (
        lambda: with_weight("lm_head", torch.empty(0)),
        "sharded weights: lm_head.weight is not whole",
    ),
    "half a projection": (
        lambda: with_weight("model.layers.1.self_attn.q_proj", torch.empty(32, 64)),
        r"q_proj is \[32, 64\], its configuration says \[64, 64\]",
    ),
    "no head": (lambda: make_source().model, "a LlamaModel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(StageError, match=message):
        DecodeEngine(model, 2, 16)
    assert unsupported(model)


def test_distributed_tensors_are_refused() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    model = make_source()
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        projection = model.model.layers[0].mlp.up_proj
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.data, init_device_mesh("cpu", (1,))))
        assert "sharded weights: model.layers.0.mlp.up_proj.weight" in unsupported(model)
    finally:
        distributed.destroy_process_group()


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


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}], ids=str)
def test_a_cpu_decodes_in_double_precision(settings: dict) -> None:
    model, rows = make_source().double(), prompts()
    answers = DecodeEngine(model, 3, 40, dtype=torch.float64).generate(rows, Sampling(max_new_tokens=6, **settings))
    if not settings:
        assert answers.tokens == [generate(model, [row], 6)[0] for row in rows]
    for row, answer, logprobs in zip(rows, answers.tokens, answers.logprobs, strict=True):
        expected = full_logprobs(model, row, answer, settings.get("temperature", 1.0))
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-5, rtol=0)
