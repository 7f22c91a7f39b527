"""Train every layer of a converted model to do what the source's layer does (ILD of Zebra-Llama; MOHAWK's stage 2)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "IldConfig": "config",
    "Ild": "stage",
    "layer_loss": "loss",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
