"""Named presets of RiskPO: what the paper says, what its released scripts do, and ours.

Each has the fields of `RiskSettings` under `risk`, and under `loss` the settings of TRL's loss that go with them.
Where paper and released code differ, each has a name of its own. A given setting wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SEQUENCE = {
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "epsilon": 0.2,
    "delta": None,
    "updates_per_generation": 1,
    "scale_rewards": "none",
}
_TOKEN = {**_SEQUENCE, "loss_type": "bnpo", "importance_sampling_level": "token", "delta": 3.0}
_RELEASED = {"alpha": 0.2, "bundle_size": 5, "quantile_source": "bundle", "scale": "bundle_std"}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "rb": {
        "risk": {"credit": "rb", "quantile_source": "ema_hist", "scale": "none"},
        "loss": _SEQUENCE,
    },
    "paper": {
        "risk": {
            "alpha": 0.2,
            "beta": 0.8,
            "omega": 0.5,
            "bundle_size": 5,
            "credit": "shared",
            "baseline": "natural",
            "quantile_source": "tracked",
            "scale": "none",
        },
        "loss": _SEQUENCE,
    },
    "released_dapo": {
        "risk": {**_RELEASED, "beta": 0.8, "omega": 3.5, "credit": "sum_mean", "baseline": "none"},
        "loss": {**_TOKEN, "updates_per_generation": 4},
    },
    "released_math": {
        "risk": {**_RELEASED, "beta": 0.9, "omega": 4.25, "credit": "std", "baseline": "natural"},
        "loss": {**_TOKEN, "updates_per_generation": 2},
    },
    "neutral": {
        "risk": {
            "alpha": 0.0,
            "beta": 1.0,
            "omega": 0.0,
            "bundle_size": 1,
            "credit": "shared",
            "baseline": "copy_mean",
            "quantile_source": "batch",
            "scale": "group_std",
        },
        "loss": {**_SEQUENCE, "importance_sampling_level": "token", "scale_rewards": "group"},
    },
}


def fill(data: Any) -> Any:
    """The given settings of a stage and, for those absent or null, the values of its `preset`; else unchanged.

    `data` holds the loss settings beside a mapping `risk` of the fields of `RiskSettings`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("preset"), str) or data["preset"] not in PRESETS:
        return data
    preset, risk = PRESETS[data["preset"]], data.get("risk")
    if risk is not None and not isinstance(risk, Mapping):
        return data
    given = {name: value for name, value in data.items() if value is not None}
    own = {name: value for name, value in (risk or {}).items() if value is not None}
    return {**data, **preset["loss"], **given, "risk": {**preset["risk"], **own}}


def account(preset: str, settings: Mapping[str, Any]) -> str:
    """One sentence for the plan: what the preset set, and which of its values were replaced.

    `settings`: the stage's, dumped, with `risk` a mapping.
    """
    values = {**PRESETS[preset]["risk"], **PRESETS[preset]["loss"]}
    actual = {**settings, **settings["risk"]}
    kept = [f"{name}={value}" for name, value in values.items() if actual[name] == value]
    replaced = [f"{name}={actual[name]}" for name, value in values.items() if actual[name] != value]
    return f"preset {preset}: {', '.join(kept)}" + (f"; instead of its own: {', '.join(replaced)}" if replaced else "")
