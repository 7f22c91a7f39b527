"""Direct preference optimisation on pairs of answers, with a gate: the better model is kept."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.methods.preference.config import PreferenceConfig
    from posttrain.methods.preference.stage import Preference

_LAZY = {"PreferenceConfig": "config", "Preference": "stage"}

__all__ = ["Preference", "PreferenceConfig"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
