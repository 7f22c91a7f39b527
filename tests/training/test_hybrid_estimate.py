"""Memory formulas of Mamba-2 layers against what autograd really holds, and the layers that adapters may name."""

from __future__ import annotations

import pytest
import torch
from posttrain_kernels.ssd_scan.torch_scan import CHUNK
from source_models import make_source
from test_training_estimate import _saved_bytes
from torch import nn

from posttrain.models.architecture import cache_bytes, normalise
from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM
from posttrain.training.adapters import linear_layers
from posttrain.training.estimate import SCAN_CHUNK, ActivationPlan, activation_bytes_per_token, inference_memory
from posttrain.training.speed import reads_device

SHAPES = [
    {},
    {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8},
    {"hidden_size": 128, "intermediate_size": 384, "num_key_value_heads": 4, "head_dim": 32},
]


def _model(mixers=("mamba2", "mamba2"), **shape) -> UpcycledForCausalLM:
    source = make_source(**shape)
    config = UpcycledConfig.from_source(source.config, mixers=list(mixers))
    return UpcycledForCausalLM._from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mixers", [("mamba2", "mamba2"), ("mamba2", "full_attention")], ids="-".join)
def test_activations_within_a_fifth(mixers, shape, precision):
    model = _model(mixers, **shape).train()
    measured = (_saved_bytes(model, 576, precision) - _saved_bytes(model, 64, precision)) / 512
    predicted = activation_bytes_per_token(normalise(model.config.to_dict()), precision, ActivationPlan())
    assert 0.8 < predicted / measured < 1.25


def test_the_chunk_is_the_operators():
    assert SCAN_CHUNK == CHUNK


def test_linear_layers_are_the_models():
    model = _model(("mamba2", "full_attention"))
    arch = normalise(model.config.to_dict())
    for index, layer in enumerate(model.model.layers):
        found = {
            name.split(".")[-1]: (module.in_features, module.out_features)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        assert linear_layers(arch, index) == found


def test_the_cache_term_counts_states_once_a_sequence():
    arch = normalise(_model(("mamba2", "full_attention")).config.to_dict())
    terms = [inference_memory(arch, tokens, 3, 2)["cache"] for tokens in (1, 100)]
    assert terms == [3 * cache_bytes(arch, tokens, 2) for tokens in (1, 100)]
    assert terms[1] - terms[0] == 3 * 99 * 2 * 2 * 2 * 16
    assert torch.tensor(terms).min() > 3 * 4 * 4 * 16 * 16


def test_a_model_with_states_is_not_captured_in_a_graph():
    assert not reads_device(_model(("full_attention", "full_attention")))
    assert reads_device(_model(("mamba2", "full_attention")))
