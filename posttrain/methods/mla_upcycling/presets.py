"""Named presets of `mla_upcycle`: the settings of a publication, or of a measurement, in one word.

A preset stands in for the defaults of the settings that are not given; a given one wins, except for the rotary plan,
which is what a preset is about. Where paper and released code of X-EcoMLA differ, each has a name of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BUDGETS = ("kv_lora_rank", "kv_ratio", "bytes_per_token", "energy")
"""Settings of which a conversion wants exactly one."""

_X_ECOMLA = {"rotary_plan": "xeco", "energy": 0.95}
PRESETS: dict[str, dict[str, Any]] = {
    "activation_aware": {
        "rotary_plan": "rorope",
        "latent_plan": "bkv",
        "objective": "attention",
        "rank_allocation": "water_fill",
    },
    "x_ecomla_paper": {**_X_ECOMLA, "energy_rule": "at_least", "rank_multiple": 1, "rotary_scaling": "source"},
    "x_ecomla_released": {
        **_X_ECOMLA,
        "energy_rule": "released",
        "rank_multiple": 8,
        "rotary_scaling": "yarn",
        "yarn_original_max_position_embeddings": 4096,
    },
    "transmla": {
        "rotary_plan": "rorope",
        "freqfold": "search",
        "latent_plan": "bkv",
        "balance_ratio": 1.0,
        "objective": "activation",
        "calibration_tokens": 32_768,
        "calibration_sequence_length": 256,
    },
}


def fill(data: Any) -> Any:
    """The given settings and, for those that are absent or null, the values of their preset; anything else unchanged.

    Raises:
        ValueError: another rotary plan than the preset's.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("preset"), str) or data["preset"] not in PRESETS:
        return data
    values = PRESETS[data["preset"]]
    plan = data.get("rotary_plan")
    if plan not in (None, values["rotary_plan"]):
        raise ValueError(
            f"preset={data['preset']} is rotary_plan={values['rotary_plan']}, not {plan}: leave one of them out"
        )
    given = {name: value for name, value in data.items() if value is not None}
    if any(name in given for name in BUDGETS):
        # An energy decides every layer's rank by itself.
        left = (*BUDGETS, "rank_allocation") if "energy" in given else BUDGETS
        values = {name: value for name, value in values.items() if name not in left}
    return {**data, **{name: value for name, value in values.items() if name not in given}}


def account(preset: str, settings: Mapping[str, Any]) -> str:
    """One sentence for the plan: what the preset set, and which of its values were replaced."""
    values = PRESETS[preset]
    kept = [f"{name}={value}" for name, value in values.items() if settings[name] == value]
    replaced = [f"{name}={settings[name]}" for name, value in values.items() if settings[name] not in (value, None)]
    return f"preset {preset}: {', '.join(kept)}" + (f"; instead of its own: {', '.join(replaced)}" if replaced else "")
