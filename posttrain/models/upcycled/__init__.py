"""The upcycled decoder. This folder is copied beside saved weights, so it imports torch and transformers alone."""

from __future__ import annotations

from typing import Any

__all__ = ["UpcycledConfig", "UpcycledForCausalLM", "UpcycledModel"]


def __getattr__(name: str) -> Any:
    if name == "UpcycledConfig":
        from .configuration_upcycled import UpcycledConfig

        return UpcycledConfig
    if name in __all__:
        from . import modeling_upcycled

        return getattr(modeling_upcycled, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
