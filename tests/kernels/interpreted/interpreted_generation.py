"""The whole decoder on the Triton kernels: what a GPU runs, less its graphs."""

import sys
from pathlib import Path

import pytest
import torch
from source_models import make_source

sys.path.insert(0, str(Path(__file__).parents[2] / "generation"))
from generation_models import generate, make_upcycled, prompts  # noqa: E402

from posttrain.generation import DecodeEngine, Sampling  # noqa: E402

MODELS = {
    "qwen3": lambda: make_source("qwen3", num_hidden_layers=1),
    "mixed": lambda: make_upcycled(mixers=["full_attention", "latent_attention"], kv_lora_rank=[None, 24]),
    "states": lambda: make_upcycled("qwen3", mixers=["mamba2", "full_attention"], mamba_bias=True),
    "states, own taps": lambda: make_upcycled(
        mixers=["mamba2"] * 2, mamba_repeat_before_conv=True, mamba_conv_kernel=6
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_generate(name):
    torch.set_num_threads(1)
    model, rows = MODELS[name](), prompts((3, 2))
    free = generate(model, rows, 4)
    sampling = Sampling(max_new_tokens=4, stop=(free[0][1],))
    answers = DecodeEngine(model, 2, 7).generate(rows, sampling)
    assert answers.tokens == generate(model, rows, 4, sampling.stop)
