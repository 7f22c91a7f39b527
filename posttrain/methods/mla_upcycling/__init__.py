"""Turn a pretrained MHA/GQA decoder into one with multi-head latent attention (X-EcoMLA, TransMLA)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "MlaUpcycleConfig": "config",
    "MlaUpcycle": "stage",
    "MlaShape": "shape",
    "resolve_shape": "shape",
    "CalibrationStatistics": "calibration",
    "collect_statistics": "calibration",
    "LayerPlan": "plan",
    "MlaPlan": "plan",
    "build_plan": "build",
    "apply_plan": "convert",
    "upcycle": "convert",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
