"""Fast decoding of any supported model: static caches, fused operators, one CUDA graph a batch size."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Sampling": "settings",
    "DecodeEngine": "engine",
    "Generated": "engine",
    "unsupported": "support",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
