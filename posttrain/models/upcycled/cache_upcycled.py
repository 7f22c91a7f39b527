"""The cache of a model: transformers' own, which reads `layer_types`, with one gap filled."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from .configuration_upcycled import UpcycledConfig


def only_states(config: UpcycledConfig) -> bool:
    """Whether no layer caches keys: nothing in the cache then says how many tokens it has seen."""
    return "full_attention" not in config.layer_types


def new_cache(config: UpcycledConfig) -> DynamicCache:
    """An empty cache for this model."""
    return StateCache(config=config) if only_states(config) else DynamicCache(config=config)


class StateCache(DynamicCache):
    """A cache of states alone that counts its tokens: `generate` asks every cache, and states do not know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = 0

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen += conv_states.shape[-1] if layer_idx == 0 else 0
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.seen = 0
