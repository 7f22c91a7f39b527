"""Supervised fine-tuning on conversations, prompts with completions, or plain text."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.methods.sft.config import SftConfig
    from posttrain.methods.sft.stage import Sft

_LAZY = {"SftConfig": "config", "Sft": "stage"}

__all__ = ["Sft", "SftConfig"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
