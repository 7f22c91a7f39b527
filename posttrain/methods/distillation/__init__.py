"""Logit distillation from a frozen teacher."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.methods.distillation.config import DistillConfig
    from posttrain.methods.distillation.loss import distillation_loss, kl_from_hidden
    from posttrain.methods.distillation.stage import Distill

_LAZY = {"DistillConfig": "config", "Distill": "stage", "distillation_loss": "loss", "kl_from_hidden": "loss"}

__all__ = ["Distill", "DistillConfig", "distillation_loss", "kl_from_hidden"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
