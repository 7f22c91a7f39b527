"""A `mamba2` mixer of ours in the layout of transformers' Mamba-2: shared heads written out, nothing approximated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.errors import StageError
from posttrain.models.upcycled.mamba_upcycled import Mamba2


def stock_tensors(mixer: Mamba2) -> dict[str, Tensor]:
    """Parameters of transformers' `Mamba2Mixer` with `n_groups = num_heads` that computes the same, by its names.

    Rows of x and B of `in_proj`, and their channels of the convolution, are repeated for every head that shares them:
    2 (H − G) d_h D more weights. The norm behind the gate is per group, as in mamba_ssm and newer transformers (5.23);
    transformers 5.17 normalises all heads together in its Mamba-2, whatever `n_groups` is, and so gives another result.

    Raises:
        StageError: the mixer has something that the stock layout lacks.
    """
    config = mixer.config
    lacking = {
        "norms on B and C (QK-norm)": config.qk_norm,
        "a gate without norm": not config.mamba_norm,
        "a convolution without activation": not config.mamba_conv_activation,
        "heads that are together no multiple of the hidden width": mixer.inner % config.hidden_size != 0,
    }
    if wrong := [what for what, has in lacking.items() if has]:
        raise StageError(
            f"the stock Mamba-2 layout has no place for {' and '.join(wrong)}",
            where=f"layer {mixer.layer_idx}",
            fix="export in the native format",
        )
    tensors = written_out(mixer)
    # The stock layout has biases on both projections or on none.
    for name in ("in_proj", "out_proj"):
        if stock_config(mixer)["use_bias"] and f"{name}.bias" not in tensors:
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.bias"] = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
    return tensors


def written_out(mixer: Mamba2) -> dict[str, Tensor]:
    """Parameters of the mixer with as many groups as heads that computes the same, by the names of both layouts."""
    tensors = {name: tensor.detach().clone() for name, tensor in mixer.named_parameters()}
    shared, inner = mixer.shared, mixer.inner
    for name in ("in_proj.weight", "in_proj.bias"):
        if name in tensors:
            z, x, b, c, dt = tensors[name].split((inner, shared, shared, inner, mixer.num_heads))
            tensors[name] = torch.cat([z, _repeated(x, mixer), _repeated(b, mixer), c, dt])
    if not mixer.repeats_first:
        for name in ("conv1d.weight", "conv1d.bias"):
            x, b, c = tensors[name].split((shared, shared, inner))
            tensors[name] = torch.cat([_repeated(x, mixer), _repeated(b, mixer), c])
    return tensors


def stock_config(mixer: Mamba2) -> dict[str, Any]:
    """The fields of transformers' `Mamba2Config` that the mixer's shapes and numerics need."""
    config = mixer.config
    return {
        "hidden_size": config.hidden_size,
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_dim,
        "state_size": mixer.head_dim,
        "n_groups": mixer.num_heads,
        "expand": mixer.inner // config.hidden_size,
        "conv_kernel": config.mamba_conv_kernel,
        "use_conv_bias": True,
        "use_bias": config.mamba_bias or config.mamba_out_bias,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.rms_norm_eps,
    }


def _repeated(rows: Tensor, mixer: Mamba2) -> Tensor:
    """Rows of G heads to H, neighbours sharing."""
    groups = mixer.num_heads // mixer.num_key_value_heads
    return rows.unflatten(0, (-1, mixer.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
