"""Group relative policy optimisation (GRPO and its kin) with verifiable rewards, on TRL."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.methods.grpo.config import GrpoConfig
    from posttrain.methods.grpo.stage import Grpo

_LAZY = {"GrpoConfig": "config", "Grpo": "stage"}

__all__ = ["Grpo", "GrpoConfig"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
