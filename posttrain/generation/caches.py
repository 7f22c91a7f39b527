"""Static caches of the layers: allocated once, written by slot, compacted by row.

Legend: B rows, G key/value heads, S slots, d head width, r latent width, d_r rotary width of latent attention.
A row's tokens lie in the slots start_b … of its row; all rows write the same slot at a step.
"""

from __future__ import annotations

import torch


class LayerCache:
    """Tensors of one layer whose first dimension is the row. A kind of layer with a state adds a subclass.

    Attributes:
        tensors: all of them, [B, …]; what compaction moves and what counts as memory.
        moving: of these, tensors that a step changes in such a way that taking it again does something else.
    """

    tensors: tuple[torch.Tensor, ...]
    moving: tuple[torch.Tensor, ...] = ()

    def keep_rows(self, order: torch.Tensor) -> None:
        """Row `order[i]` becomes row i, for the first `len(order)` rows; the other rows hold nothing of use."""
        for tensor in self.tensors:
            tensor[: order.shape[0]] = tensor.index_select(0, order)

    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class KeyValueCache(LayerCache):
    """Keys and values of grouped-query attention, each [B, G, S, d]."""

    def __init__(self, rows: int, heads: int, slots: int, width: int, **where: object) -> None:
        self.keys = torch.empty(rows, heads, slots, width, **where)
        self.values = torch.empty(rows, heads, slots, width, **where)
        self.tensors = (self.keys, self.values)

    def write(self, rows: slice, slots: slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keys and values [b, G, t, d] of a prompt."""
        self.keys[rows, :, slots], self.values[rows, :, slots] = keys, values


class LatentCache(LayerCache):
    """Latents [B, S, r] and rotary keys [B, S, d_r] of latent attention."""

    def __init__(self, rows: int, slots: int, rank: int, rope: int, **where: object) -> None:
        self.latents = torch.empty(rows, slots, rank, **where)
        self.rope = torch.empty(rows, slots, rope, **where)
        self.tensors = (self.latents, self.rope)

    def write(self, rows: slice, slots: slice, latents: torch.Tensor, rope: torch.Tensor) -> None:
        """Latents [b, t, r] and rotary keys [b, t, d_r] of a prompt."""
        self.latents[rows, slots], self.rope[rows, slots] = latents, rope


class StateCache(LayerCache):
    """Recurrent states [B, H, d, d] of a state-space layer, fp32 or wider, and the last K columns [B, C, K] that its
    convolution sees."""

    def __init__(
        self, rows: int, heads: int, width: int, channels: int, kernel: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.states = torch.zeros(rows, heads, width, width, dtype=wide, device=device)
        self.columns = torch.zeros(rows, channels, kernel, dtype=dtype, device=device)
        self.tensors = self.moving = (self.states, self.columns)

    def write(self, rows: slice, columns: torch.Tensor, states: torch.Tensor) -> None:
        """What a prompt leaves: its columns [b, C, at least K] and states [b, H, d, d]."""
        self.columns[rows], self.states[rows] = columns[..., -self.columns.shape[-1] :], states
