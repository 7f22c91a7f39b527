"""From a source model and calibration statistics to a plan, one layer at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling import latent, rotary
from posttrain.methods.mla_upcycling.calibration import CalibrationStatistics, attention_layers
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.plan import LayerPlan, MlaPlan
from posttrain.methods.mla_upcycling.shape import MlaShape, resolve_shape
from posttrain.models.architecture import normalise


def as_config(config: MlaUpcycleConfig | Mapping[str, Any]) -> MlaUpcycleConfig:
    """The stage's config from itself or from a plain dict of its fields."""
    return config if isinstance(config, MlaUpcycleConfig) else MlaUpcycleConfig(**config)


def build_plan(
    model: nn.Module,
    cfg: MlaUpcycleConfig | Mapping[str, Any],
    stats: CalibrationStatistics | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> MlaPlan:
    """Decide every matrix of the conversion that does not follow from the source weights alone.

    Args:
        model: a source causal LM of a supported family.
        stats: from `collect_statistics`; None plans from the weights.
        on_layer: called with the number of layers done; it may raise to stop.

    Raises:
        RecipeError: unsupported model, impossible rank, or an objective that needs `stats`.
    """
    cfg = as_config(cfg)
    shape = resolve_shape(normalise(model.config.to_dict()), cfg)
    objective = cfg.objective_for(stats is not None)
    if objective != "weight" and stats is None:
        raise RecipeError(
            f"objective={objective} needs calibration text",
            where="objective",
            fix="give a calibration input, e.g. inputs.calibration=data.train, or objective=weight",
        )
    layers = []
    for index, attention in enumerate(attention_layers(model)):
        second, mean = (None, None) if objective == "weight" else (stats.second[index], stats.mean[index])
        source = SourceLayer.read(attention, second, mean)
        layers.append(_plan_layer(index, source, shape, cfg, objective))
        if on_layer is not None:
            on_layer(index + 1)
    provenance = {
        "config": cfg.key_fields(),
        "objective": objective,
        "calibration_tokens": stats.tokens if objective != "weight" else 0,
    }
    return MlaPlan(shape, tuple(layers), provenance)


@dataclass(frozen=True)
class SourceLayer:
    """One source attention block in float64, with the moments of its input (None, None: white)."""

    query: tuple[Tensor, Tensor]
    keys_values: tuple[Tensor, Tensor]
    output: Tensor
    second: Tensor | None
    mean: Tensor | None

    @classmethod
    def read(cls, attention: nn.Module, second: Tensor | None = None, mean: Tensor | None = None) -> SourceLayer:
        query, key, value = (_affine(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj"))
        stacked = (torch.cat([key[0], value[0]]), torch.cat([key[1], value[1]]))
        device = key[0].device
        moments = [moment if moment is None else moment.to(device) for moment in (second, mean)]
        return cls(query, stacked, attention.o_proj.weight.detach().double(), *moments)


def _affine(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach().double()
    return weight, bias


def _plan_layer(index: int, source: SourceLayer, shape: MlaShape, cfg: MlaUpcycleConfig, objective: str) -> LayerPlan:
    width = shape.kv_heads * shape.head_dim  # G·d_h
    moment, mean = latent.output_moment(*source.keys_values, source.second, source.mean)
    rope_rows = list(shape.rope_rows)
    pairs = rotary.head_moments(moment[:width, :width], rope_rows, shape.kv_heads)
    weigh = rotary.principal_weights if cfg.key_kind == "principal" else rotary.mean_weights
    key_weights, query_weights = weigh(pairs)

    selected = _nope_index(shape, moment.device)
    published = cfg.rotary_plan == "xeco"
    eye = torch.eye(2 * width, dtype=moment.dtype, device=moment.device)
    if published:  # X-EcoMLA decomposes every key row and drops the rotary ones afterwards.
        position_free, keys = eye, width
    else:
        shared = rotary.shared_key_rows(key_weights, rope_rows, shape.head_dim)
        carried = rotary.carried_rows(query_weights, rope_rows, shape.head_dim)
        residual = eye[:width].clone()
        residual[:, :width] -= carried @ shared
        position_free, keys = torch.cat([residual[selected], eye[width:]]), selected.numel()
    centred = shape.latent_bias and not published
    if centred:
        moment = _without_key_mean(position_free, moment, mean, keys)
    else:
        moment = position_free @ moment @ position_free.T

    weighting, unweighting, alpha = _weighting(moment, keys, source, shape, objective, balanced=not published)
    found = latent.low_rank(moment, shape.kv_lora_rank, weighting, unweighting)
    key_rows = selected if published else torch.arange(keys, device=moment.device)
    decode = torch.cat([found.decode[key_rows], found.decode[keys:]])
    losses = _losses(moment, found, key_rows, keys, pairs, key_weights, query_weights, cfg.residual_kept)
    summary = {"layer": index, "kv_lora_rank": shape.kv_lora_rank, "energy": found.energy, "alpha": alpha, **losses}
    encode = (found.encode @ position_free).float()
    # From the rounded matrix and in float64: Qwen2's biases are large, and all but nothing must be left of them.
    offset = encode.double()[:, :width] @ (mean[:width] * centred)
    tensors = (key_weights.float(), query_weights.float(), encode, decode.float(), offset)
    return LayerPlan(*(tensor.cpu() for tensor in tensors), summary=summary)


def _nope_index(shape: MlaShape, device: torch.device) -> Tensor:
    """Rows of the un-repeated keys that get a position-free part, by head."""
    rows = torch.tensor(shape.nope_rows, dtype=torch.long, device=device)
    return (torch.arange(shape.kv_heads, device=device)[:, None] * shape.head_dim + rows).flatten()


def _without_key_mean(transform: Tensor, moment: Tensor, mean: Tensor, keys: int) -> Tensor:
    """Second moment of n = T y less the mean of its position-free keys.

    A constant in position-free keys adds the same number to every score of a query, which the softmax forgets. With a
    bias in the latent it can be left out exactly, and then no rank is spent on it.
    """
    centre = transform @ mean
    offset = torch.zeros_like(centre)
    offset[:keys] = centre[:keys]
    cross = torch.outer(centre, offset)
    return transform @ moment @ transform.T - cross - cross.T + torch.outer(offset, offset)


def _weighting(
    moment: Tensor, keys: int, source: SourceLayer, shape: MlaShape, objective: str, balanced: bool
) -> tuple[Tensor, Tensor, float]:
    """S, S⁻¹ and α: the metric of the objective, with keys divided by α."""
    size = moment.shape[0]
    weighting = torch.eye(size, dtype=moment.dtype, device=moment.device)
    unweighting = weighting.clone()
    if objective == "attention":
        key_metric, value_metric = _attention_metrics(source, shape)
        roots = [latent.symmetric_root(metric) for metric in (key_metric, value_metric)]
        weighting, unweighting = (torch.block_diag(*roots[0][side], *roots[1][side]) for side in (0, 1))
    alpha = latent.balance(weighting @ moment @ weighting.T, keys) if balanced else 1.0
    weighting[:keys] /= alpha
    unweighting[:, :keys] *= alpha
    return weighting, unweighting, alpha


def _attention_metrics(source: SourceLayer, shape: MlaShape) -> tuple[Tensor, Tensor]:
    """How much an error in a KV head's key or value matters.

    Returns:
        for keys sum_h E[q_h q_hᵀ] [G, d_n, d_n], for values sum_h W_o,hᵀ W_o,h [G, d_v, d_v], h over the group's heads.
    """
    weight, bias = source.query
    weight, bias = weight.view(shape.heads, shape.head_dim, -1), bias.view(shape.heads, shape.head_dim)
    nope, group = list(shape.nope_rows), shape.heads // shape.kv_heads
    queries = [(weight[head, nope], bias[head, nope]) for head in range(shape.heads)]
    moments = [latent.output_moment(*query, source.second, source.mean)[0] for query in queries]
    output = source.output.view(-1, shape.heads, shape.head_dim).transpose(0, 1)  # [H, D, d_h]
    keys = torch.stack(moments).unflatten(0, (shape.kv_heads, group)).sum(1)
    return keys, (output.mT @ output).unflatten(0, (shape.kv_heads, group)).sum(1)


def _losses(
    moment: Tensor,
    found: latent.LowRank,
    key_rows: Tensor,
    keys: int,
    pairs: Tensor,
    key_weights: Tensor,
    query_weights: Tensor,
    residual_kept: bool,
) -> dict[str, float]:
    """Relative errors of keys and values (root of lost over total energy) and the share of key energy still rotated."""
    missing = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device) - found.decode @ found.encode
    lost = ((missing @ moment) * missing).sum(1).clamp_min(0)
    total = moment.diagonal()
    carry = query_weights[:, :, None] * key_weights[:, None, :]  # [pairs, G, G]
    carried = _trace(carry @ pairs @ carry.mT)
    beside = torch.eye(pairs.shape[1], dtype=pairs.dtype, device=pairs.device) - carry
    dropped = 0.0 if residual_kept else _trace(beside @ pairs @ beside.mT)
    key_total = total[key_rows].sum().item() + carried + dropped
    key_error = _root_ratio(lost[key_rows].sum().item() + dropped, key_total)
    value_error = _root_ratio(lost[keys:].sum().item(), total[keys:].sum().item())
    return {
        "key_error": key_error,
        "value_error": value_error,
        "rel_error": ((key_error**2 + value_error**2) / 2) ** 0.5,
        "rotary_energy": carried / key_total if key_total > 0 else 0.0,
    }


def _trace(matrices: Tensor) -> float:
    return matrices.diagonal(dim1=-2, dim2=-1).sum().item()


def _root_ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0
