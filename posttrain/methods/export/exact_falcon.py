"""Whether a stock FalconH1 can be equal to a hybrid, and what it then holds: from its architecture, without torch.

A FalconH1 layer adds attention and a Mamba-2 mixer behind one norm to the residual stream, then a gated MLP behind a
second norm. A layer with one of the two is a FalconH1 layer whose other half is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import Problem
from posttrain.models.architecture import mixers

SILU = ("silu", "swish")
_NATIVE = "use to=native"
_WHERE = "to=falcon_h1"


def obstacles(arch: Mapping[str, Any]) -> list[Problem]:
    """Why a `falcon_h1` export would not be exact, each with a remedy; empty where it is."""
    kinds = mixers(arch)
    if arch["model_type"] != "upcycled" or "mamba2" not in kinds:
        what = "no layer carries a state: FalconH1 is for hybrids of mamba2 and full_attention layers"
        return [Problem(what, _WHERE, _NATIVE)]
    found = []
    if latent := [layer for layer, kind in enumerate(kinds) if kind == "latent_attention"]:
        fix = f"keep the attention layers of the source instead of their conversion, or {_NATIVE}"
        found.append(Problem(f"FalconH1 has no latent attention (layers {latent})", _WHERE, fix))
    if arch.get("qk_norm"):
        what = "FalconH1 has no QK-norm on its attention heads, nor on B and C of its states"
        found.append(Problem(what, _WHERE, _NATIVE))
    if not arch["mamba_conv_activation"]:
        what = "an activation follows FalconH1's convolution and none follows this model's (init=aligned)"
        found.append(Problem(what, _WHERE, f"start with init=published, or {_NATIVE}"))
    if arch["hidden_act"] not in SILU:
        what = f"FalconH1 has one activation for MLP and convolution, this model {arch['hidden_act']} and silu"
        found.append(Problem(what, _WHERE, _NATIVE))
    if arch["mamba_bias"] and arch["mamba_conv_kernel"] > 1:
        # Its code masks what goes into the projection, not what comes out of it.
        what = (
            "in_proj has a bias (mamba_bias), which FalconH1 adds to padding too: its convolution carries it into the "
            f"first {arch['mamba_conv_kernel'] - 1} tokens of every left-padded text"
        )
        found.append(Problem(what, _WHERE, _NATIVE))
    return found


def attention_half(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the attention in every layer of the stock class: one head where no layer of the model has attention.

    FalconH1 has biases on all four projections or on none.
    """
    layers, used = arch["num_hidden_layers"], "full_attention" in mixers(arch)
    biased = used and bool(arch["attention_bias"] or arch["attention_out_bias"])
    heads = {} if used else {"num_attention_heads": 1, "num_key_value_heads": 1}
    half = {"mixers": ["full_attention"] * layers, "attention_bias": biased, "attention_out_bias": biased}
    return {**arch, **heads, **half}


def state_half(arch: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the mixer in every layer of the stock class: no head shares x or B with another."""
    heads = {"num_key_value_heads": arch["num_attention_heads"]}
    return {**arch, **heads, "mixers": ["mamba2"] * arch["num_hidden_layers"]}
