"""Carry out a plan: the source's weights and the plan's matrices become a latent-attention model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.methods.mla_upcycling.build import as_config, build_plan
from posttrain.methods.mla_upcycling.calibration import CalibrationStatistics, attention_layers, collect_statistics
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.plan import LayerPlan, MlaPlan
from posttrain.methods.mla_upcycling.shape import MlaShape

if TYPE_CHECKING:
    from posttrain.models.upcycled import UpcycledForCausalLM


def upcycle(
    model: nn.Module,
    config: MlaUpcycleConfig | Mapping[str, Any],
    calibration: CalibrationStatistics | Iterable[Tensor] | None = None,
) -> tuple[UpcycledForCausalLM, dict[str, Any]]:
    """Turn a Llama, Mistral or Qwen2 model into one with multi-head latent attention.

    Args:
        model: the source; it is not changed.
        config: the stage's config or a dict of its fields, e.g. {"kv_lora_rank": 64}.
        calibration: token batches [B, T] without padding, or ready statistics; None plans from the weights.

    Returns:
        the new model (same device and dtype) and the conversion report: shape, real kv_ratio, and under "layers" rank,
        energy, errors and α of every layer.

    Raises:
        RecipeError: unsupported model or impossible dimensions.
    """
    config = as_config(config)
    if calibration is not None and not isinstance(calibration, CalibrationStatistics):
        batches = [calibration] if isinstance(calibration, Tensor) else calibration
        calibration = collect_statistics(model, batches)
    plan = build_plan(model, config, calibration)
    return apply_plan(model, plan), plan.report()


def apply_plan(model: nn.Module, plan: MlaPlan, on_layer: Callable[[int], None] | None = None) -> UpcycledForCausalLM:
    """The converted model: every attention block by the plan, everything else a copy of the source.

    Args:
        on_layer: called with the number of layers done; it may raise to stop.

    Raises:
        ValueError: the plan is for a model of another depth.
    """
    from posttrain.models.upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    sources = attention_layers(model)
    if len(sources) != len(plan.layers):
        raise ValueError(f"the plan has {len(plan.layers)} layers, the model {len(sources)}")
    shape = plan.shape
    ranks = [layer.rank for layer in plan.layers]
    config = UpcycledConfig.from_source(
        model.config,
        mixers=["latent_attention"] * len(sources),
        kv_lora_rank=ranks[0] if len(set(ranks)) == 1 else ranks,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
        v_head_dim=shape.v_head_dim,
        rope_frequency_indices=list(shape.rope_frequency_indices),
        latent_bias=shape.latent_bias,
        query_pre_attn_scalar=shape.head_dim,
    )
    new = build_upcycled(model, config)
    scale = float(getattr(model.model.rotary_emb, "attention_scaling", 1.0))
    for index, (source, target) in enumerate(zip(sources, attention_layers(new), strict=True)):
        write_tensors(target, layer_tensors(source, plan.layers[index], shape, scale))
        if on_layer is not None:
            on_layer(index + 1)
    return new


def layer_tensors(
    attention: nn.Module, layer: LayerPlan, shape: MlaShape, rotary_scale: float = 1.0
) -> dict[str, Tensor]:
    """Weights and biases of one latent-attention block, float64, by parameter name.

    `rotary_scale` is the factor that the source puts on cos and sin (YaRN): position-free rows lose the rotation but
    must keep its square.
    """
    tensors = _query(attention.q_proj, layer, shape, rotary_scale**2)
    tensors |= _down(attention, layer, shape)
    tensors["kv_b_proj.weight"] = _up(layer.decode.double().to(attention.k_proj.weight.device), shape)
    for name, tensor in attention.o_proj.named_parameters():
        tensors[f"o_proj.{name}"] = tensor.detach().double()
    return tensors


def write_tensors(attention: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a block's parameters.

    Raises:
        ValueError: a parameter is missing on one side, or a shape differs.
    """
    parameters = dict(attention.named_parameters())
    if parameters.keys() != tensors.keys():
        raise ValueError(f"latent attention has {sorted(parameters)}, the conversion made {sorted(tensors)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name}: {tuple(tensors[name].shape)} does not fit {tuple(parameter.shape)}")
            parameter.copy_(tensors[name])


def _query(linear: nn.Linear, layer: LayerPlan, shape: MlaShape, nope_scale: float) -> dict[str, Tensor]:
    """Per head d_n position-free rows, then d_r rotary rows by the map of the head's group."""
    device = linear.weight.device
    group = shape.heads // shape.kv_heads
    rotary = layer.rotary_query.double().to(device)  # [G, d_r, d_h]
    nope = nope_scale * torch.eye(shape.head_dim, dtype=torch.float64, device=device)[list(shape.nope_rows)]
    maps = torch.cat([nope.expand(shape.kv_heads, -1, -1), rotary], dim=1).repeat_interleave(group, 0)
    return {
        f"q_proj.{name}": torch.einsum(
            "hod,hd...->ho...", maps, tensor.detach().double().unflatten(0, (shape.heads, shape.head_dim))
        ).flatten(0, 1)
        for name, tensor in linear.named_parameters()
    }


def _down(attention: nn.Module, layer: LayerPlan, shape: MlaShape) -> dict[str, Tensor]:
    """`kv_a_proj_with_mqa`: r latent rows, then the d_r rows of the shared rotary key."""
    device = attention.k_proj.weight.device
    encode, shared = layer.encode.double().to(device), layer.rotary_key.double().to(device)
    down = torch.cat([encode, torch.cat([shared, torch.zeros_like(shared)], dim=1)])  # [r + d_r, 2·G·d_h]
    sides = (attention.k_proj, attention.v_proj)
    tensors = {"kv_a_proj_with_mqa.weight": down @ torch.cat([side.weight.detach().double() for side in sides])}
    if shape.latent_bias:
        bias = down @ torch.cat([side.bias.detach().double() for side in sides])
        bias[: layer.rank] -= layer.latent_offset.to(device)
        tensors["kv_a_proj_with_mqa.bias"] = bias
    return tensors


def _up(decode: Tensor, shape: MlaShape) -> Tensor:
    """`kv_b_proj` from the un-repeated expansion: per query head its group's d_n key rows, then d_v value rows."""
    keys, values = decode.split([shape.kv_heads * shape.qk_nope_head_dim, shape.kv_heads * shape.v_head_dim])
    heads = torch.cat(
        [
            part.unflatten(0, (shape.kv_heads, width))
            for part, width in ((keys, shape.qk_nope_head_dim), (values, shape.v_head_dim))
        ],
        dim=1,
    )
    return heads.repeat_interleave(shape.heads // shape.kv_heads, 0).flatten(0, 1)
