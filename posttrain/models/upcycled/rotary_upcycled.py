"""Rotary embedding with the source's frequencies, all of them or a selection."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_upcycled import UpcycledConfig
from .registry_upcycled import MIXERS


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(a, b) to (-b, a) on the two halves of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` [B, heads, T, d] by `cos`, `sin` [B, T, d] (half-split layout: entry i turns with entry i + d/2)."""
    return x * cos.unsqueeze(1) + rotate_half(x) * sin.unsqueeze(1)


class UpcycledRotaryEmbedding(nn.Module):
    """Cosines and sines for every selection of frequencies that the model's layers use.

    The frequencies come from transformers' own functions on the source's head width, so that scaled embeddings (llama3,
    yarn, linear, dynamic) are those of the source, and its attention factor is kept. `groups[layer]` is the index of a
    layer's selection in what `forward` returns, or None for a layer without rotary embedding.

    With `latent_rope_parameters` the latent layers turn with frequencies of their own and another attention factor.
    """

    def __init__(self, config: UpcycledConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        inv_freq, self.attention_scaling = self._source_frequencies()
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)
        kinds = [MIXERS[mixer].rotary for mixer in config.mixers]
        used = [kind for kind in ("source", "selected") if kind in kinds]
        self.groups = [None if kind is None else used.index(kind) for kind in kinds]
        self.kinds = used
        self.own_latent = "selected" in used and config.latent_rope_parameters is not None
        if self.own_latent:
            latent_inv_freq, self.latent_scaling = self._latent_frequencies()
            self.latent_inv_freq = nn.Buffer(latent_inv_freq, persistent=False)
        elif "selected" in used:
            self.selection = nn.Buffer(self._selection(), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per selection (cos, sin), each [B, T, d] in the type of `x`, for `position_ids` [B, T]."""
        positions = position_ids[..., None].float()
        angles = positions * self.inv_freq.to(device=x.device, dtype=torch.float)
        return [self._group(kind, angles, positions, x) for kind in self.kinds]

    def _group(
        self, kind: str, angles: torch.Tensor, positions: torch.Tensor, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "selected" and self.own_latent:
            return _embed(positions * self.latent_inv_freq.to(device=x.device), self.latent_scaling, x)
        return _embed(angles if kind == "source" else angles[..., self.selection], self.attention_scaling, x)

    def reset_buffers(self) -> None:
        """Fill the buffers, which are not saved, after the module was made on the meta device."""
        inv_freq, self.attention_scaling = self._source_frequencies()
        init.copy_(self.inv_freq, inv_freq)
        init.copy_(self.original_inv_freq, inv_freq)
        if self.own_latent:
            latent_inv_freq, self.latent_scaling = self._latent_frequencies()
            init.copy_(self.latent_inv_freq, latent_inv_freq)
        elif "selected" in self.kinds:
            init.copy_(self.selection, self._selection())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> UpcycledRotaryEmbedding:
        """Move with the model, but stay fp32: rounded to bf16, a frequency is off by whole turns at far positions."""
        names = ("inv_freq", "original_inv_freq", *(("latent_inv_freq",) if self.own_latent else ()))
        exact = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _source_frequencies(self) -> tuple[torch.Tensor, float]:
        return _frequencies(self.config)

    def _latent_frequencies(self) -> tuple[torch.Tensor, float]:
        as_if = copy.copy(self.config)
        as_if.rope_parameters = dict(self.config.latent_rope_parameters)
        as_if.head_dim = self.config.qk_rope_head_dim
        return _frequencies(as_if)

    def _selection(self) -> torch.Tensor:
        return torch.tensor(self.config.kept_frequencies(), dtype=torch.long)


def _frequencies(config: UpcycledConfig) -> tuple[torch.Tensor, float]:
    """The d_h/2 inverse frequencies and the attention factor that transformers gives this configuration."""
    rope_type = config.rope_parameters["rope_type"]
    if rope_type != "default":
        return ROPE_INIT_FUNCTIONS[rope_type](config, None)
    base, width = config.rope_parameters["rope_theta"], config.head_dim
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float) / width)), 1.0


def _embed(angles: torch.Tensor, factor: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * factor).to(x.dtype), (both.sin() * factor).to(x.dtype)
