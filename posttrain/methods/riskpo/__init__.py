"""Risk-averse policy optimisation on verifiable rewards: scores of bundles of questions, weighted by a risk measure."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.methods.riskpo.estimator import RiskAdvantages, advantages, risk_advantages
    from posttrain.methods.riskpo.measure import mvar_score
    from posttrain.methods.riskpo.presets import PRESETS
    from posttrain.methods.riskpo.quantiles import Tracker, make_tracker
    from posttrain.methods.riskpo.settings import RiskSettings

_LAZY = {
    "PRESETS": "presets",
    "RiskAdvantages": "estimator",
    "RiskSettings": "settings",
    "Tracker": "quantiles",
    "advantages": "estimator",
    "make_tracker": "quantiles",
    "mvar_score": "measure",
    "risk_advantages": "estimator",
}

__all__ = [
    "PRESETS",
    "RiskAdvantages",
    "RiskSettings",
    "Tracker",
    "advantages",
    "make_tracker",
    "mvar_score",
    "risk_advantages",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
