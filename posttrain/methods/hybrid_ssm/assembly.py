"""A hybrid from two aligned models of one source: every layer is the one of the model that has its kind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from posttrain.errors import RecipeError
from posttrain.methods.hybrid_ssm.shape import (
    LATENT_FIELDS,
    MAMBA_FIELDS,
    assembled_mixers,
    check_donors,
    check_kept,
)
from posttrain.models.architecture import normalise

if TYPE_CHECKING:
    from posttrain.models.upcycled import UpcycledForCausalLM


SAME_SOURCE = 0.2
"""Embeddings further apart than this share of their norm are not of one source; training moves them by less."""


@torch.no_grad()
def embedding_distance(one: nn.Module, other: nn.Module) -> float:
    """Norm of the difference of two models' embeddings, relative to that of the first's."""
    a, b = (model.get_input_embeddings().weight.float() for model in (one, other))
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


@torch.no_grad()
def assemble(state: nn.Module, attention: nn.Module, kept: Sequence[int]) -> UpcycledForCausalLM:
    """Layers `kept` of `attention`, all others of `state`, tensors as they are there, in the wider of the two types.

    A layer comes whole, with its MLP and norms, which alignment has trained. The final norm comes from the model that
    gives the last layer; embeddings and head, which both have from the source, from `state`.

    Args:
        state: state-space layers everywhere; attention: attention of any kind everywhere. Neither is changed.
        kept: indices of layers.

    Raises:
        RecipeError: the two are not of one source (shapes, or embeddings unlike), or an index is none of their layers.
    """
    from posttrain.models.upcycled import UpcycledConfig, UpcycledForCausalLM

    shapes = [normalise(model.config.to_dict()) for model in (state, attention)]
    check_donors(*shapes, where="state, attention")
    check_kept(kept, shapes[0]["num_hidden_layers"], "kept")
    if (apart := embedding_distance(state, attention)) > SAME_SOURCE:
        raise RecipeError(
            f"the two models are not of one source: their embeddings differ by {apart:.0%} of their norm",
            where="state, attention",
            fix="convert both from the same model",
        )
    latent = {name: getattr(attention.config, name) for name in LATENT_FIELDS if hasattr(attention.config, name)}
    fields = {**{name: getattr(state.config, name) for name in MAMBA_FIELDS}, **latent}
    kinds = assembled_mixers(shapes[1], kept)
    config = UpcycledConfig.from_source(state.config, mixers=kinds, **fields)
    with torch.device(state.device):
        hybrid = UpcycledForCausalLM._from_config(
            config,
            dtype=torch.promote_types(state.dtype, attention.dtype),
            attn_implementation=state.config._attn_implementation,
        )
    last = attention if config.num_hidden_layers - 1 in kept else state
    parts = [(hybrid.model.embed_tokens, state.model.embed_tokens), (hybrid.model.norm, last.model.norm)]
    if not config.tie_word_embeddings:
        parts.append((hybrid.lm_head, state.lm_head))
    for index, layer in enumerate(hybrid.model.layers):
        donor = state if kinds[index] == "mamba2" else attention
        parts.append((layer, donor.model.layers[index]))
    for part, donor in parts:
        part.load_state_dict(donor.state_dict(), strict=True)
    hybrid.tie_weights()
    hybrid.generation_config = copy.deepcopy(state.generation_config)
    return hybrid.train(state.training)
