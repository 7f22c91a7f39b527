"""A decoder's blocks one by one: what each is called with, and its two outputs. For any Llama-shaped model.

Legend: B batch, T tokens, D hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockCalls:
    """What a model calls its blocks with for some token ids: `hidden` [B, T, D] before the first, and per block its
    further arguments (rotary embeddings, masks), which do not depend on hidden states."""

    hidden: Tensor
    arguments: tuple[dict[str, Any], ...]


def block_calls(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> BlockCalls:
    """The calls of all blocks for ids [B, T] without padding; no block is computed.

    `positions` [B, T] that start anew inside a row part it into documents. The model's own code makes embeddings, masks
    and rotary embeddings, whatever its family.
    """
    extra = {} if positions is None else {"position_ids": positions}
    with _recording(model.model.layers) as seen:
        model.model(input_ids=ids, use_cache=False, **extra)
    hidden = seen[0][0]
    return BlockCalls(hidden, tuple(arguments for _, arguments in seen))


def block_outputs(block: nn.Module, hidden: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The mixer's output and the block's, each [B, T, D]: what `block(hidden, **arguments)` computes, in two parts.

    Llama's, Mistral's, Qwen2's and Qwen3's blocks and the upcycled ones are alike: norm, mixer, sum, norm, MLP, sum.
    """
    mixed = block.self_attn(hidden_states=block.input_layernorm(hidden), **arguments)
    mixed = mixed[0] if isinstance(mixed, tuple) else mixed
    between = hidden + mixed
    return mixed, between + block.mlp(block.post_attention_layernorm(between))


@contextmanager
def _recording(blocks: nn.ModuleList) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Inside, a block gives back what it gets; yields the hidden states and other arguments of every call."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def passing(hidden_states: Tensor, **arguments: Any) -> Tensor:
        seen.append((hidden_states, arguments))
        return hidden_states

    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = passing
    try:
        yield seen
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
