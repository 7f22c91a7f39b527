"""Evaluation against the model a pipeline started from: perplexity, KL, cache bytes, speed, samples."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "EvaluateConfig": "config",
    "Evaluate": "stage",
    "Sums": "metrics",
    "score_window": "metrics",
    "summarise": "metrics",
    "cache_bytes": "measure",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
