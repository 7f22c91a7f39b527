"""What TRL's chunked head takes beside the terms of `posttrain.training.estimate`; no torch, for plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TILE_TOKENS, TILE_ENTRIES, TILES = 4096, 32768, 3
"""Tokens by vocabulary entries of a tile, in fp32, and how many exist at once."""


def head_bytes(arch: Mapping[str, Any], micro_batch_tokens: int) -> int:
    """Peak bytes of TRL's chunked head: its tiles, the head in fp32 and its gradient."""
    tiles = TILES * min(TILE_TOKENS, micro_batch_tokens) * TILE_ENTRIES
    return 4 * (tiles + 2 * arch["vocab_size"] * arch["hidden_size"])
