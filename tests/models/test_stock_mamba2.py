"""A mixer written out in the stock layout computes the same in transformers' own Mamba-2."""

from __future__ import annotations

import inspect

import pytest
import torch
from hybrid_models import VARIANTS, make_hybrid
from transformers import DynamicCache, Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from posttrain.errors import StageError
from posttrain.models.stock_mamba2 import stock_config, stock_tensors

GROUPED = "group_size" in inspect.signature(MambaRMSNormGated.__init__).parameters


@pytest.mark.skipif(not GROUPED, reason="this transformers normalises all heads of a Mamba-2 layer together")
@pytest.mark.parametrize(
    "variant", ["4 heads share", "2 heads share", "none share", "own taps", "biases", "longer convolution"]
)
def test_the_stock_mixer_gives_the_same(variant: str) -> None:
    ours = make_hybrid(**VARIANTS[variant]).model.layers[0].self_attn
    config = Mamba2Config(num_hidden_layers=1, chunk_size=16, **stock_config(ours))
    stock = Mamba2Mixer(config, layer_idx=0).eval()
    stock.load_state_dict(stock_tensors(ours), strict=True)
    u = torch.randn(2, 37, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours(u)
        assert torch.allclose(stock(u), expected, atol=2e-5)
        cache = DynamicCache(config=config)
        steps = torch.cat([stock(part, cache_params=cache) for part in u.split([30, *[1] * 7], dim=1)], 1)
        assert torch.allclose(steps, expected, atol=2e-5)
    kv_heads = ours.num_key_value_heads
    grown = sum(tensor.numel() for tensor in stock_tensors(ours).values()) - sum(p.numel() for p in ours.parameters())
    if variant in ("4 heads share", "2 heads share"):
        assert grown == 2 * (8 - kv_heads) * 8 * 64 + 2 * (8 - kv_heads) * 8 * (config.conv_kernel + 1)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (VARIANTS["qk norm"], "norms on B and C"),
        (VARIANTS["no norm"], "a gate without norm"),
        (VARIANTS["no activation"], "without activation"),
        ({"head_dim": 12}, "no multiple"),
    ],
    ids=["qk norm", "no norm", "no activation", "odd width"],
)
def test_what_the_layout_lacks_is_refused(variant: dict, words: str) -> None:
    with pytest.raises(StageError, match=words):
        stock_tensors(make_hybrid(**variant).model.layers[0].self_attn)
