"""A pretrained decoder with some attention layers replaced by state-space layers made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm.config import HybridConfig
from posttrain.methods.hybrid_ssm.init import AttentionStats, MambaForm, init_from_attention
from posttrain.methods.hybrid_ssm.shape import LATENT_FIELDS, check_donated, check_form, check_layers
from posttrain.methods.hybrid_ssm.statistics import HeadStatistics, collect_head_statistics
from posttrain.models.architecture import mixers, normalise

if TYPE_CHECKING:
    from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM


def hybridize(
    model: nn.Module,
    layer_types: Sequence[str],
    config: HybridConfig | Mapping[str, Any] | None = None,
    statistics: HeadStatistics | Iterable[Tensor] | None = None,
    latent_from: nn.Module | None = None,
) -> UpcycledForCausalLM:
    """The hybrid: `mamba2` layers start from the source's attention, all else is copied.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model, or an upcycled one; it is not changed.
        layer_types: mixer of each layer: `mamba2`, `full_attention`, or `latent_attention` where the source or
            `latent_from` has it.
        config: how layers start, or a dict of its fields.
        statistics: for `init: aligned`: token batches [B, T] without padding, or ready statistics.
        latent_from: a conversion of the same source, by `mla_upcycling.upcycle`, aligned or not: layers that become
            `latent_attention` are taken from it whole, with the MLP and norms they were aligned with.

    Returns:
        the new model, of the source's device and dtype; decays, step biases and skips are fp32.

    Raises:
        RecipeError: an unsupported model, or layers that cannot be made from this source.
    """
    from posttrain.models.upcycling import build_upcycled

    config = config if isinstance(config, HybridConfig) else HybridConfig(**(config or {}))
    source = normalise(model.config.to_dict())
    donated = None if latent_from is None else mixers(normalise(latent_from.config.to_dict()))
    check_layers(source, list(layer_types), donated)
    if latent_from is not None:
        check_donated(source, list(layer_types), normalise(latent_from.config.to_dict()), "latent_from")
    new_layers = [i for i, (old, new) in enumerate(zip(mixers(source), layer_types, strict=True)) if old != new]
    made = [index for index in new_layers if layer_types[index] == "mamba2"]
    if config.init == "aligned" and made:
        statistics = _statistics(model, statistics)
    hybrid_config = _config(model, list(layer_types), config, latent_from)
    hybrid = build_upcycled(model, hybrid_config)
    form = mamba_form(hybrid_config)
    for index in new_layers:
        target = hybrid.model.layers[index]
        if index in made:
            target = target.self_attn
            attention = model.model.layers[index].self_attn
            stats = attention_stats(attention, source, statistics, index)
            # A layer's random numbers are its own: another choice of layers leaves them as they are.
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
            tensors = init_from_attention(*projections, stats, init=config.init, form=form, generator=generator)
        else:
            tensors = dict(latent_from.model.layers[index].named_parameters())
        _write(target, tensors, index)
    return hybrid


def mamba_form(config: UpcycledConfig) -> MambaForm:
    """The form of the `mamba2` layers of that model."""
    return MambaForm(
        kernel=config.mamba_conv_kernel,
        repeat_before_conv=config.mamba_repeat_before_conv,
        norm=config.mamba_norm,
        bias=config.mamba_bias,
        out_bias=config.mamba_out_bias,
    )


def attention_stats(attention: nn.Module, arch: Mapping[str, Any], statistics: Any, index: int) -> AttentionStats:
    """What is known of one attention layer."""
    norms = {name: getattr(attention, name).weight for name in ("q_norm", "k_norm") if arch["qk_norm"]}
    distance = statistics.distance[index] if isinstance(statistics, HeadStatistics) else None
    return AttentionStats(
        arch["num_attention_heads"], arch["num_key_value_heads"], arch["head_dim"], distance=distance, **norms
    )


def _statistics(model: nn.Module, given: HeadStatistics | Iterable[Tensor] | None) -> HeadStatistics:
    if given is None:
        raise RecipeError(
            "the aligned init needs each head's mean attention distance, and no text is given",
            where="init: aligned",
            fix="give token batches or `collect_head_statistics(...)` as statistics, or use init: published",
        )
    if isinstance(given, HeadStatistics):
        return given
    return collect_head_statistics(model, [given] if isinstance(given, Tensor) else given)


def _config(
    model: nn.Module, layer_types: list[str], config: HybridConfig, latent_from: nn.Module | None
) -> UpcycledConfig:
    from posttrain.models.upcycled import UpcycledConfig

    form = config.config_fields()
    check_form(normalise(model.config.to_dict()), layer_types, form, "layer_types")
    latent = {name: getattr(latent_from.config, name) for name in LATENT_FIELDS} if latent_from is not None else {}
    return UpcycledConfig.from_source(model.config, mixers=layer_types, **form, **latent)


def _write(target: nn.Module, tensors: Mapping[str, Tensor], index: int) -> None:
    parameters = dict(target.named_parameters())
    wrong = parameters.keys() ^ tensors.keys()
    wrong |= {name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape}
    if wrong:
        raise RecipeError(
            f"layer {index} does not take {', '.join(sorted(wrong))} of what it should start from",
            where=f"layer_types[{index}]",
            fix="convert both models from the same source",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
