"""From a source model and calibration statistics to a plan, one layer at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling import freqfold, latent, rotary
from posttrain.methods.mla_upcycling.budget import largest_rank
from posttrain.methods.mla_upcycling.calibration import CalibrationStatistics
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.plan import LayerPlan, MlaPlan
from posttrain.methods.mla_upcycling.query import LowRankQuery, low_rank_query
from posttrain.methods.mla_upcycling.ranks import energy_rank, water_fill
from posttrain.methods.mla_upcycling.shape import MlaShape, resolve_shape
from posttrain.methods.mla_upcycling.source import SourceLayer
from posttrain.models.architecture import normalise


def as_config(config: MlaUpcycleConfig | Mapping[str, Any]) -> MlaUpcycleConfig:
    """The stage's config from itself or from a plain dict of its fields."""
    return config if isinstance(config, MlaUpcycleConfig) else MlaUpcycleConfig(**config)


def build_plan(
    model: nn.Module,
    cfg: MlaUpcycleConfig | Mapping[str, Any],
    stats: CalibrationStatistics | None = None,
    on_layer: Callable[[int], None] | None = None,
    held: Callable[[int], AbstractContextManager[nn.Module]] | None = None,
) -> MlaPlan:
    """Decide every matrix of the conversion that does not follow from the source weights alone.

    Args:
        model: a source causal LM of a supported family.
        stats: from `collect_statistics`; None plans from the weights.
        on_layer: called with the number of layers done in all `cfg.planning_passes`; it may raise to stop.
        held: where weights stay on disk, the decoder layer of an index while the context lasts.

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
    held = held or (lambda index: nullcontext(model.model.layers[index]))
    frequencies = source_frequencies(model) if cfg.freqfold == "search" else None

    def read(index: int) -> SourceLayer:
        with held(index) as layer:
            return SourceLayer.read(layer.self_attn, *(() if objective == "weight" else stats.of_layer(index)))

    def decompose(source: SourceLayer) -> _Parts:
        return _decompose(source, shape, cfg, objective, frequencies)

    done = on_layer or (lambda _: None)
    layers = []
    before = (cfg.planning_passes - 1) * shape.layers
    for index, rank in enumerate(_ranks(cfg, shape, lambda index: decompose(read(index)), done)):
        source = read(index)
        narrow = None if shape.q_lora_rank is None else low_rank_query(source, shape, objective)
        layers.append(_finish(index, decompose(source), rank, narrow))
        done(before + index + 1)
    provenance = {
        "config": cfg.key_fields(),
        "objective": objective,
        "calibration_tokens": stats.tokens if objective != "weight" else 0,
    }
    return MlaPlan(shape, tuple(layers), provenance)


def source_frequencies(model: nn.Module) -> Tensor:
    """Rotary frequencies [d_h/2] of a source model, float64, from its config alone."""
    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycled.rotary_upcycled import UpcycledRotaryEmbedding

    return UpcycledRotaryEmbedding(UpcycledConfig.from_source(model.config)).inv_freq.double()


@dataclass(frozen=True)
class _Parts:
    """One layer before its rank is known; `maps` are the rotary ones, `key_mean` what the latent leaves out.

    `search` is what freqfold=search found, for the summary.
    """

    maps: tuple[Tensor, Tensor]
    moment: Tensor
    weighting: Tensor
    unweighting: Tensor
    alpha: float
    position_free: Tensor
    keys: int
    key_rows: Tensor
    key_mean: Tensor
    carried: float
    dropped: float
    search: dict[str, Any]


def _decompose(
    source: SourceLayer, shape: MlaShape, cfg: MlaUpcycleConfig, objective: str, frequencies: Tensor | None = None
) -> _Parts:
    """Everything of a layer that does not depend on its rank; `frequencies` are wanted by freqfold=search."""
    width = shape.kv_heads * shape.head_dim  # G·d_h
    moment, mean = source.key_value_moments()
    search: dict[str, Any] = {}
    if frequencies is not None:
        met = source.group_query_moments(shape.heads, shape.kv_heads)
        turning = frequencies.to(moment.device)
        fold, errors = freqfold.best_fold(moment[:width, :width], met, turning, shape.qk_rope_head_dim)
        search = {"freqfold": fold, "score_errors": {str(one): error for one, error in errors.items()}}
    rotary_key, rotary_query = _rotary_maps(moment[:width, :width], shape, cfg, search.get("freqfold"))
    carry = rotary.carried_rows(rotary_query) @ rotary_key  # [G·d_h, G·d_h]
    carried, dropped = _key_energies(moment[:width, :width], carry, shape, cfg.residual_kept)

    selected = _nope_index(shape, moment.device)
    published = cfg.rotary_plan == "xeco"
    eye = torch.eye(2 * width, dtype=moment.dtype, device=moment.device)
    if published:  # X-EcoMLA decomposes every key row and drops the rotary ones afterwards.
        position_free, keys = eye, width
    else:
        residual = eye[:width].clone()
        residual[:, :width] -= carry
        position_free, keys = torch.cat([residual[selected], eye[width:]]), selected.numel()
    centred = shape.latent_bias and not published
    if centred:
        moment = _without_key_mean(position_free, moment, mean, keys)
    else:
        moment = position_free @ moment @ position_free.T

    balance = cfg.balance_ratio if cfg.latent_kind == "bkv" else None
    weighting, unweighting, alpha = _weighting(moment, keys, source, shape, objective, balance)
    key_rows = selected if published else torch.arange(keys, device=moment.device)
    centre = mean[:width] * centred
    metric = (moment, weighting, unweighting)
    kept = (alpha, position_free, keys, key_rows, centre, carried, dropped)
    return _Parts((rotary_key, rotary_query), *metric, *kept, search)


def _finish(index: int, parts: _Parts, rank: int, narrow: LowRankQuery | None) -> LayerPlan:
    found = latent.low_rank(parts.moment, rank, parts.weighting, parts.unweighting)
    decode = torch.cat([found.decode[parts.key_rows], found.decode[parts.keys :]])
    losses = _losses(parts.moment, found, parts.key_rows, parts.keys, parts.carried, parts.dropped)
    summary = {"layer": index, "kv_lora_rank": rank, "energy": found.energy, "alpha": parts.alpha}
    summary |= losses | parts.search
    encode = (found.encode @ parts.position_free).float()
    # From the rounded matrix and in float64: Qwen2's biases are large, and all but nothing must be left of them.
    offset = encode.double()[:, : parts.key_mean.numel()] @ parts.key_mean
    tensors = [*(matrix.float() for matrix in parts.maps), encode, decode.float(), offset]
    query = []
    if narrow is not None:
        query = [narrow.found.encode.float().cpu(), narrow.found.decode.float().cpu()]
        summary |= {"q_lora_rank": len(query[0]), "query_error": narrow.error}
    return LayerPlan(*(tensor.cpu() for tensor in tensors), summary, *query)


def _ranks(
    cfg: MlaUpcycleConfig, shape: MlaShape, decompose: Callable[[int], _Parts], done: Callable[[int], None]
) -> list[int]:
    """The rank of every layer; where it follows from spectra these come first, so that no layer's matrices are kept."""
    if cfg.energy is None and cfg.allocation == "uniform":
        return [shape.kv_lora_rank] * shape.layers
    spectra = []
    for index in range(shape.layers):
        parts = decompose(index)
        spectra.append(latent.spectrum(parts.moment, parts.weighting).cpu())
        done(index + 1)
    largest = min(largest_rank(cfg, shape.head_dim, shape.kv_heads, shape.qk_rope_head_dim), len(spectra[0]))
    spectra = [spectrum[:largest] for spectrum in spectra]
    if cfg.energy is not None:
        ranks = [energy_rank(spectrum, cfg.energy, cfg.rank_multiple, cfg.energy_rule) for spectrum in spectra]
        if cfg.end_layer_rank is not None:
            ranks[0] = ranks[-1] = cfg.end_layer_rank
        return ranks
    total = shape.layers * shape.kv_lora_rank
    if cfg.bytes_per_token is not None:
        total = cfg.bytes_per_token // 2 - shape.layers * shape.qk_rope_head_dim
    try:
        return water_fill(spectra, total, cfg.rank_multiple)
    except ValueError as error:
        raise RecipeError(
            str(error), where="rank_multiple", fix="a larger budget or a smaller rank_multiple"
        ) from error


def _rotary_maps(
    moment: Tensor, shape: MlaShape, cfg: MlaUpcycleConfig, searched: int | None = None
) -> tuple[Tensor, Tensor]:
    """`rotary_key` [d_r, G·d_h] and `rotary_query` [G, d_r, d_h] of the rotary plan, from the moment of the keys."""
    if cfg.rotary_plan == "lossless":
        return rotary.folded_maps(moment, shape.kv_heads, fold=1, kept=shape.kv_heads)
    if cfg.rotary_plan == "rorope":
        collapse = shape.head_dim // shape.qk_rope_head_dim
        fold = searched or cfg.freqfold or collapse
        return rotary.folded_maps(moment, shape.kv_heads, fold, fold // collapse)
    rows = list(shape.rope_rows)
    weigh = rotary.principal_weights if cfg.key_kind == "principal" else rotary.mean_weights
    weights = weigh(rotary.head_moments(moment, rows, shape.kv_heads))
    return rotary.pair_maps(*weights, rows, shape.head_dim)


def _key_energies(moment: Tensor, carry: Tensor, shape: MlaShape, residual_kept: bool) -> tuple[float, float]:
    """Energy of the keys that stays rotated, and energy of rotary rows that no position-free key keeps."""
    carried = ((carry @ moment) * carry).sum().item()
    if residual_kept or not shape.rope_rows:
        return carried, 0.0
    beside = torch.eye(carry.shape[0], dtype=carry.dtype, device=carry.device) - carry
    left = ((beside @ moment) * beside).sum(1).unflatten(0, (shape.kv_heads, shape.head_dim))
    return carried, left[:, list(shape.rope_rows)].sum().item()


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
    moment: Tensor, keys: int, source: SourceLayer, shape: MlaShape, objective: str, balance: float | None
) -> tuple[Tensor, Tensor, float]:
    """S, S⁻¹ and α: the metric of the objective, keys divided by α: `balance` times the balanced value; None: 1."""
    size = moment.shape[0]
    weighting = torch.eye(size, dtype=moment.dtype, device=moment.device)
    unweighting = weighting.clone()
    if objective == "attention":
        key_metric, value_metric = _attention_metrics(source, shape)
        roots = [latent.symmetric_root(metric) for metric in (key_metric, value_metric)]
        weighting, unweighting = (torch.block_diag(*roots[0][side], *roots[1][side]) for side in (0, 1))
    alpha = 1.0 if balance is None else balance * latent.balance(weighting @ moment @ weighting.T, keys)
    weighting[:keys] /= alpha
    unweighting[:, :keys] *= alpha
    return weighting, unweighting, alpha


def _attention_metrics(source: SourceLayer, shape: MlaShape) -> tuple[Tensor, Tensor]:
    """How much an error in a KV head's key or value matters.

    Returns:
        for keys sum_h E[q_h q_hᵀ] [G, d_n, d_n], for values sum_h W_o,hᵀ W_o,h [G, d_v, d_v], h over the group's heads.
    """
    nope, group = list(shape.nope_rows), shape.heads // shape.kv_heads
    output = source.output.view(-1, shape.heads, shape.head_dim).transpose(0, 1)  # [H, D, d_h]
    keys = source.group_query_moments(shape.heads, shape.kv_heads)[:, nope][:, :, nope]
    return keys, (output.mT @ output).unflatten(0, (shape.kv_heads, group)).sum(1)


def _losses(
    moment: Tensor,
    found: latent.LowRank,
    key_rows: Tensor,
    keys: int,
    carried: float,
    dropped: float,
) -> dict[str, float]:
    """Relative errors of keys and values (root of lost over total energy) and the share of key energy still rotated."""
    missing = torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device) - found.decode @ found.encode
    lost = ((missing @ moment) * missing).sum(1).clamp_min(0)
    total = moment.diagonal()
    key_total = total[key_rows].sum().item() + carried + dropped
    key_error = _root_ratio(lost[key_rows].sum().item() + dropped, key_total)
    value_error = _root_ratio(lost[keys:].sum().item(), total[keys:].sum().item())
    return {
        "key_error": key_error,
        "value_error": value_error,
        "rel_error": ((key_error**2 + value_error**2) / 2) ** 0.5,
        "rotary_energy": carried / key_total if key_total > 0 else 0.0,
    }


def _root_ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0
