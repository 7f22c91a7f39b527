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
from posttrain.methods.mla_upcycling.shape import MlaShape, misfits
from posttrain.models.architecture import normalise

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM


def upcycle(
    model: nn.Module,
    config: MlaUpcycleConfig | Mapping[str, Any],
    calibration: CalibrationStatistics | Iterable[Tensor] | None = None,
) -> tuple[UpcycledForCausalLM, dict[str, Any]]:
    """Turn a Llama, Mistral, Qwen2 or Qwen3 model into one with multi-head latent attention.

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
        ValueError: the plan is for a model of another shape.
    """
    from posttrain.models.upcycling import build_upcycled

    sources = attention_layers(model)
    new = build_upcycled(model, converted_config(model.config, plan))
    scale = rotary_scale(model)
    for index, (source, target) in enumerate(zip(sources, attention_layers(new), strict=True)):
        write_tensors(target, layer_tensors(source, plan.layers[index], plan.shape, scale))
        if on_layer is not None:
            on_layer(index + 1)
    return new


def rotary_scale(model: nn.Module) -> float:
    """The factor that a source puts on cos and sin (YaRN)."""
    return float(getattr(model.model.rotary_emb, "attention_scaling", 1.0))


def converted_config(source: PretrainedConfig, plan: MlaPlan) -> UpcycledConfig:
    """The config of the converted model.

    Raises:
        ValueError: the plan is for a model of another shape.
    """
    from posttrain.models.upcycled import UpcycledConfig

    shape = plan.shape
    if wrong := misfits(shape, normalise(source.to_dict())):
        raise ValueError(f"the plan is for another model: {'; '.join(wrong)}")
    ranks = [layer.rank for layer in plan.layers]
    return UpcycledConfig.from_source(
        source,
        mixers=["latent_attention"] * len(plan.layers),
        kv_lora_rank=ranks[0] if len(set(ranks)) == 1 else ranks,
        qk_nope_head_dim=shape.qk_nope_head_dim,
        qk_rope_head_dim=shape.qk_rope_head_dim,
        v_head_dim=shape.v_head_dim,
        q_lora_rank=shape.q_lora_rank,
        rope_frequency_indices=None if shape.latent_rope_parameters else list(shape.rope_frequency_indices),
        latent_rope_parameters=shape.latent_rope_parameters,
        latent_bias=shape.latent_bias,
        query_pre_attn_scalar=shape.head_dim,
    )


def layer_tensors(
    attention: nn.Module, layer: LayerPlan, shape: MlaShape, rotary_scale: float = 1.0
) -> dict[str, Tensor]:
    """Weights and biases of one latent-attention block, float64, by parameter name.

    `rotary_scale` is the factor that the source puts on cos and sin (YaRN): position-free rows lose the rotation but
    must keep its square.
    """
    tensors = _query(attention, layer, shape, rotary_scale**2)
    tensors |= _down(attention, layer, shape)
    if shape.qk_norm:
        for part in ("k_proj", "k_norm", "q_norm"):
            named = getattr(attention, part).named_parameters()
            tensors |= {f"{part}.{name}": tensor.detach().double() for name, tensor in named}
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


def _query(attention: nn.Module, layer: LayerPlan, shape: MlaShape, nope_scale: float) -> dict[str, Tensor]:
    """Per head d_n position-free rows, then d_r rotary rows by the map of the head's group.

    With QK-norm the projection stays the source's and the maps are a parameter of their own, applied after the norm.
    """
    linear, maps = attention.q_proj, _query_maps(layer, shape, nope_scale, attention.q_proj.weight.device)
    if shape.qk_norm:
        return {**_projections(linear, layer, None), "q_map": maps}
    return _projections(linear, layer, maps.repeat_interleave(shape.heads // shape.kv_heads, 0))


def _query_maps(layer: LayerPlan, shape: MlaShape, nope_scale: float, device: torch.device) -> Tensor:
    """[G, d_n + d_r, d_h] from a source query head of each group."""
    rotary = layer.rotary_query.double().to(device)
    nope = nope_scale * torch.eye(shape.head_dim, dtype=torch.float64, device=device)[list(shape.nope_rows)]
    return torch.cat([nope.expand(shape.kv_heads, -1, -1), rotary], dim=1)


def _projections(linear: nn.Linear, layer: LayerPlan, maps: Tensor | None) -> dict[str, Tensor]:
    """`q_proj`, or `q_a_proj` and `q_b_proj` of a low-rank query; `maps` [H, out, d_h] act on every head."""

    def mapped(tensor: Tensor) -> Tensor:  # [H·d_h, ...] to [H·out, ...]
        if maps is None:
            return tensor
        return torch.einsum("hod,hd...->ho...", maps, tensor.unflatten(0, (len(maps), -1))).flatten(0, 1)

    parameters = {name: tensor.detach().double() for name, tensor in linear.named_parameters()}
    if layer.query_encode is None:
        return {f"q_proj.{name}": mapped(tensor) for name, tensor in parameters.items()}
    encode, decode = (part.double().to(linear.weight.device) for part in (layer.query_encode, layer.query_decode))
    tensors = {"q_a_proj.weight": encode @ parameters["weight"], "q_b_proj.weight": mapped(decode)}
    return tensors | ({"q_b_proj.bias": mapped(parameters["bias"])} if "bias" in parameters else {})


def _down(attention: nn.Module, layer: LayerPlan, shape: MlaShape) -> dict[str, Tensor]:
    """`kv_a_proj_with_mqa`: r latent rows, then the d_r rows of the shared rotary key.

    Columns are the hidden state's; with QK-norm those of the normalised keys follow, and the hidden state gives values.
    """
    device, width = attention.k_proj.weight.device, shape.kv_heads * shape.head_dim
    encode, shared = layer.encode.double().to(device), layer.rotary_key.double().to(device)
    down = torch.cat([encode, torch.cat([shared, torch.zeros_like(shared)], dim=1)])  # [r + d_r, 2·G·d_h]
    keys, values = down.split(width, dim=1)
    value_weight, key_weight = (part.weight.detach().double() for part in (attention.v_proj, attention.k_proj))
    if shape.qk_norm:
        weight = torch.cat([values @ value_weight, keys], dim=1)
    else:
        weight = down @ torch.cat([key_weight, value_weight])
    tensors = {"kv_a_proj_with_mqa.weight": weight}
    if shape.latent_bias:
        # The keys' bias, where a norm follows, stays in `k_proj`.
        key_bias = torch.zeros_like(_bias(attention.k_proj)) if shape.qk_norm else _bias(attention.k_proj)
        bias = down @ torch.cat([key_bias, _bias(attention.v_proj)])
        bias[: layer.rank] -= layer.latent_offset.to(device)
        tensors["kv_a_proj_with_mqa.bias"] = bias
    return tensors


def _bias(linear: nn.Linear) -> Tensor:
    if linear.bias is None:
        return torch.zeros(linear.weight.shape[0], dtype=torch.float64, device=linear.weight.device)
    return linear.bias.detach().double()


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
