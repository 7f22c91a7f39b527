"""From a source model to an upcycled one: copy what stays, leave the new mixers to the method."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
from posttrain.models.upcycled.modeling_upcycled import UpcycledForCausalLM


def convert_full_attention(source_model: PreTrainedModel) -> UpcycledForCausalLM:
    """The same model as an upcycled one: full attention everywhere, equal parameters, equal logits.

    Raises:
        ValueError: the source is not of a supported family.
    """
    return build_upcycled(source_model, UpcycledConfig.from_source(source_model.config))


@torch.no_grad()
def build_upcycled(source_model: PreTrainedModel, config: UpcycledConfig) -> UpcycledForCausalLM:
    """An upcycled model with everything copied that the source has too: embeddings, norms, MLPs, head, kept mixers.

    Mixers of another kind than the source's are left to the caller, who must write every parameter of them: they are
    NaN, so that a forgotten one shows in the first loss. A source may itself be upcycled: its mixers of an equal kind
    and shape are copied. Type, device, attention implementation, training mode and generation settings are those of the
    source.

    Raises:
        ValueError: a parameter outside the new mixers has no counterpart of its shape in the source, or one of the
            source outside the replaced mixers would be lost.
    """
    config = copy.deepcopy(config)
    with torch.device(source_model.device), no_init_weights():
        model = UpcycledForCausalLM._from_config(
            config, dtype=source_model.dtype, attn_implementation=source_model.config._attn_implementation
        )
    source, target = source_model.state_dict(), model.state_dict()
    new_layers = [index for index in range(config.num_hidden_layers) if not _same_mixer(model, source_model, index)]
    prefixes = tuple(f"model.layers.{index}.self_attn." for index in new_layers)
    _check_names(source, target, prefixes)
    for name, tensor in target.items():
        if name.startswith(prefixes):
            tensor.fill_(torch.nan)
        else:
            tensor.copy_(source[name])
    model.tie_weights()
    model.generation_config = copy.deepcopy(source_model.generation_config)
    return model.train(source_model.training)


def _same_mixer(model: UpcycledForCausalLM, source_model: PreTrainedModel, index: int) -> bool:
    """Whether the source has that layer's mixer already: the same kind with the same parameters."""
    kinds = getattr(source_model.config, "mixers", None) or ["full_attention"] * model.config.num_hidden_layers
    ours, theirs = model.model.layers[index].self_attn, source_model.model.layers[index].self_attn
    return model.config.mixers[index] == kinds[index] and _shapes(ours) == _shapes(theirs)


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _check_names(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], new_mixers: tuple[str, ...]) -> None:
    kept = {name: tensor.shape for name, tensor in target.items() if not name.startswith(new_mixers)}
    given = {name: tensor.shape for name, tensor in source.items() if not name.startswith(new_mixers)}
    if kept != given:
        wrong = sorted(name for name in kept.keys() | given.keys() if kept.get(name) != given.get(name))
        raise ValueError(
            f"the source does not fill the upcycled model: {len(wrong)} tensors differ in name or shape, "
            f"e.g. {wrong[0]} ({given.get(wrong[0])} in the source, {kept.get(wrong[0])} wanted)"
        )
