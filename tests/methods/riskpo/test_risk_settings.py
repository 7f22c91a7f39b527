"""Settings that do not go together are refused with a sentence; presets are what paper and scripts say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.methods.riskpo import PRESETS, RiskSettings
from posttrain.methods.riskpo.measure import omega_of_mixture
from posttrain.methods.riskpo.presets import account, fill

REFUSED = {
    "alpha=0.8 is not below beta=0.8": {"alpha": 0.8},
    "share alpha of the scores": {"risk": "cvar", "alpha": 0.0},
    "set level=question": {"risk": "pass_at_k"},
    "baseline=none is a variant of risk=mvar": {"risk": "cvar", "baseline": "none"},
    "scale=bundle_std divides by about 0": {"scale": "bundle_std", "credit": "shared"},
    "without credit=rb": {"scale": "bundle_std", "quantile_source": "bundle"},
    "scale=group_std divides by about 0": {"scale": "group_std", "credit": "shared"},
    "baseline=copy_mean": {"scale": "group_std", "credit": "shared", "bundle_size": 1},
    "bundle_size=1": {"scale": "group_std", "credit": "shared", "baseline": "copy_mean"},
    "credit=shared and": {"scale": "group_std", "credit": "std", "baseline": "copy_mean", "bundle_size": 1},
    "scale=quantile_range is of risk=mvar": {"risk": "cvar", "scale": "quantile_range"},
    "credit=shared is none": {"level": "question", "credit": "shared"},
    "leave out bundles=stratified": {"level": "question", "bundles": "stratified"},
    "quantile_source is ema_hist, tracked or batch": {"level": "question", "quantile_source": "bundle"},
    "Extra inputs": {"risk_alpha": 0.2},
    "greater than or equal to 0": {"omega": -0.1},
    "less than or equal to 1": {"beta": 1.01},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_go_together_is_refused(sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RiskSettings(**REFUSED[sentence])


@pytest.mark.parametrize(
    "good",
    [
        {"alpha": 0.0, "beta": 1.0},
        {"scale": "bundle_std", "credit": "shared", "quantile_source": "bundle"},
        {"scale": "group_std"},
        {"scale": "group_std", "level": "question"},
        {"scale": "group_std", "credit": "uniform", "bundle_size": 1, "baseline": "copy_mean"},
        {"risk": "pass_at_k", "level": "question"},
        {"risk": "cvar", "baseline": "copy_mean", "credit": "shared"},
    ],
)
def test_what_goes_together_is_taken(good: dict[str, Any]) -> None:
    RiskSettings(**good)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RiskSettings().alpha = 0.1


def test_every_setting_is_described() -> None:
    assert all(field.description for field in RiskSettings.model_fields.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_and_says_how_to_lose(preset: str) -> None:
    RiskSettings(**PRESETS[preset]["risk"])
    names = {"loss_type", "importance_sampling_level", "epsilon", "delta", "updates_per_generation", "scale_rewards"}
    assert PRESETS[preset]["loss"].keys() == names


def risk(preset: str) -> RiskSettings:
    return RiskSettings(**PRESETS[preset]["risk"])


def test_ours_is_the_default() -> None:
    assert risk("rb") == RiskSettings()


def test_the_paper() -> None:
    cfg, loss = risk("paper"), PRESETS["paper"]["loss"]
    assert (cfg.alpha, cfg.beta, cfg.omega, cfg.bundle_size) == (0.2, 0.8, 0.5, 5)
    assert (cfg.credit, cfg.baseline, cfg.quantile_source, cfg.scale) == ("shared", "natural", "tracked", "none")
    assert (loss["loss_type"], loss["importance_sampling_level"], loss["epsilon"]) == ("grpo", "sequence", 0.2)


@pytest.mark.parametrize(
    ("preset", "beta", "rule", "baseline", "updates"),
    [("released_dapo", 0.8, "sum_mean", "none", 4), ("released_math", 0.9, "std", "natural", 2)],
)
def test_the_released_scripts(preset: str, beta: float, rule: str, baseline: str, updates: int) -> None:
    cfg, loss = risk(preset), PRESETS[preset]["loss"]
    assert (cfg.alpha, cfg.beta, cfg.bundle_size) == (0.2, beta, 5)
    assert cfg.omega == pytest.approx(omega_of_mixture(1.5, 0.2, beta))
    assert (cfg.credit, cfg.baseline, cfg.quantile_source, cfg.scale) == (rule, baseline, "bundle", "bundle_std")
    assert (loss["loss_type"], loss["importance_sampling_level"]) == ("bnpo", "token")
    assert (loss["epsilon"], loss["delta"], loss["updates_per_generation"]) == (0.2, 3.0, updates)


def test_fill_takes_what_is_given_and_the_preset_for_the_rest() -> None:
    found = fill(
        {"preset": "paper", "loss_type": "dapo", "epsilon": None, "lr": 1.0, "risk": {"omega": 2, "beta": None}}
    )
    assert found["risk"] == {**PRESETS["paper"]["risk"], "omega": 2}
    assert (found["loss_type"], found["epsilon"], found["lr"]) == ("dapo", 0.2, 1.0)
    assert found["importance_sampling_level"] == "sequence"
    assert fill({"preset": "paper"})["risk"] == PRESETS["paper"]["risk"]


@pytest.mark.parametrize(
    "data",
    [7, {"alpha": 0.1}, {"preset": None}, {"preset": "other"}, {"preset": ["rb"]}, {"preset": "rb", "risk": "mvar"}],
)
def test_fill_leaves_the_rest_alone(data: Any) -> None:
    assert fill(data) is data


def test_filling_does_not_touch_the_presets() -> None:
    found = fill({"preset": "rb"})
    found["risk"]["credit"], found["loss_type"] = "shared", "none"
    assert PRESETS["rb"]["risk"]["credit"] == "rb" and PRESETS["rb"]["loss"]["loss_type"] == "grpo"


def test_an_account_names_what_was_replaced() -> None:
    filled = fill({"preset": "paper", "delta": 2.0, "risk": {"omega": 2.0}})
    said = account("paper", filled)
    kept, replaced = said.split("; instead of its own: ")
    assert kept.startswith("preset paper: alpha=0.2, beta=0.8, bundle_size=5")
    assert replaced == "omega=2.0, delta=2.0"
    assert "instead" not in account("paper", fill({"preset": "paper"}))


def test_settings_and_presets_come_without_torch() -> None:
    code = (
        "import sys; from posttrain.methods.riskpo import RiskSettings, PRESETS; RiskSettings()\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
