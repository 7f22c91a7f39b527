"""Memory formulas against what autograd and the optimiser really hold."""

from __future__ import annotations

import contextlib

import pytest
import torch
from source_models import make_source

from posttrain.models.architecture import normalise, parameter_count
from posttrain.training.estimate import (
    activation_bytes_per_token,
    inference_memory,
    trainable_parameters,
    training_memory,
)

SHAPES = [
    {},
    {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8},
    {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4, "head_dim": 32, "num_hidden_layers": 4},
]


def _saved_bytes(model, tokens, precision):
    """Bytes of distinct tensors that a forward pass leaves for the backward pass, without the weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    cast = torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        ids = torch.randint(0, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_within_a_fifth(shape, precision):
    model = make_source("llama", attn_implementation="sdpa", **shape).train()
    measured = (_saved_bytes(model, 192, precision) - _saved_bytes(model, 64, precision)) / 128
    predicted = activation_bytes_per_token(normalise(model.config.to_dict()), precision, False)
    assert 0.8 < predicted / measured < 1.25


def test_terms_add_up_for_adamw():
    model = make_source("llama")
    arch = normalise(model.config.to_dict())
    optimiser = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimiser.step()
    terms = training_memory(arch, parameter_count(arch), 64, 16)
    moments = sum(t.nbytes for s in optimiser.state.values() for name, t in s.items() if name != "step")
    assert terms["weights"] == sum(p.nbytes for p in model.parameters())
    assert terms["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    assert terms["optimizer"] == moments
    assert "teacher" not in terms


def test_teacher_chunk_and_checkpointing_move_their_own_term():
    arch = normalise(make_source("llama").config.to_dict())
    base = training_memory(arch, 1000, 64, 16)
    chunked = training_memory(arch, 1000, 64, 32)
    assert {name for name in base if base[name] != chunked[name]} == {"logits"}
    assert training_memory(arch, 1000, 64, 64) == training_memory(arch, 1000, 64, 1024)
    lean = training_memory(arch, 1000, 64, 16, gradient_checkpointing=True)
    assert lean["activations"] < base["activations"]
    taught = training_memory(arch, 1000, 64, 16, teacher=arch, teacher_bytes=2)
    assert taught.pop("teacher") > 2 * parameter_count(arch) and taught == base


def test_mixers_alone_are_counted():
    model = make_source("qwen2")
    arch = normalise(model.config.to_dict())
    mixers = sum(p.numel() for name, p in model.named_parameters() if ".self_attn." in name)
    assert trainable_parameters(arch, "mixers") == mixers
    assert trainable_parameters(arch, "all") == sum(p.numel() for p in model.parameters())


def test_inference_cache_term_is_the_cache():
    arch = normalise(make_source("llama").config.to_dict())
    terms = inference_memory(arch, tokens=10, batch=3, element_size=2)
    assert terms["cache"] == 2 * 3 * 10 * 2 * (2 * 2 * 16)
    assert terms["weights"] == 2 * parameter_count(arch)
