"""One YAML recipe is the whole post-training pipeline."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from posttrain.models.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
