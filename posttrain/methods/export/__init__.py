"""Write a model for other programs: as it is (`native`), or as a stock DeepSeek-V3 or FalconH1 where that is exact."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ExportConfig": "config",
    "Export": "stage",
    "to_deepseek": "deepseek",
    "to_falcon": "falcon",
    "export_model": "write",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
