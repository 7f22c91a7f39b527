"""Question-level weights are the derivatives of their objectives, and their estimates are unbiased."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import numpy as np
import pytest
import torch
from methods.riskpo.test_risk_measure import integral, mvar_by_hand, quantile

from posttrain.methods.riskpo import RiskSettings, advantages, make_tracker, risk_advantages, weights
from posttrain.methods.riskpo.weights import WEIGHTS, Rates

RATES = np.array([0.03, 0.11, 0.24, 0.35, 0.48, 0.52, 0.67, 0.71, 0.83, 0.96, 0.99])
EQUAL = np.full(11, 1 / 11)  # no cumulated mass of elevenths is .2 or .8
T, K = 2.5, 4

OBJECTIVES: dict[str, Callable[[np.ndarray], float]] = {
    "mvar": lambda p: mvar_by_hand(p, EQUAL, 0.2, 0.8, 0.5),
    "cvar": lambda p: integral(p, EQUAL, 0.2) / 0.2,
    "entropic": lambda p: -np.log(np.mean(np.exp(-T * p))) / T,
    "pass_at_k": lambda p: np.mean(1 - (1 - p) ** K),
    "mean": np.mean,
}


def rates_of(values: np.ndarray, count: int, low: float = 0.0, high: float = 1.0) -> Rates:
    others = torch.from_numpy(values)[:, None]
    return Rates(
        others=others,
        count=torch.full_like(others, count),
        width=torch.zeros_like(others),
        questions=torch.from_numpy(values),
        low=torch.tensor(low, dtype=torch.float64),
        high=torch.tensor(high, dtype=torch.float64),
    )


@pytest.mark.parametrize("risk", OBJECTIVES)
def test_a_weight_is_the_derivative_of_its_objective(risk: str) -> None:
    low, high = (quantile(RATES, EQUAL, level) for level in (0.2, 0.8))
    cfg = RiskSettings(risk=risk, level="question", temperature=T, k=K)
    # So many other answers that the shares of (k - 1)-sets are powers, and whole numbers of right ones.
    found = WEIGHTS[risk](rates_of(RATES, 10**9, low, high), cfg).flatten().numpy()
    step = 1e-6
    expected = np.array(
        [
            (OBJECTIVES[risk](RATES + step * one) - OBJECTIVES[risk](RATES - step * one)) / (2 * step)
            for one in np.eye(11)
        ]
    )
    # The question at a quantile has part of the mass on either side: the weight there is between those.
    inside = ~np.isin(RATES, [low, high]) if risk in ("mvar", "cvar") else np.ones(11, bool)
    np.testing.assert_allclose(found[inside] / 11, expected[inside], atol=1e-8)


@pytest.mark.parametrize("wrong", range(8))
def test_the_pass_at_k_weight_is_the_share_of_wrong_subsets(wrong: int) -> None:
    for k in range(1, 9):
        found = weights.pass_at_k_weight(torch.tensor([7.0 - wrong]), torch.tensor([7.0]), k).item()
        assert found == pytest.approx(k * comb(wrong, k - 1) / comb(7, k - 1))


def test_the_pass_at_k_gradient_is_unbiased() -> None:
    """Sum over all numbers of right answers: E[A r-score] is k (1 - p)^(k-1) p (1 - p), exactly."""
    cfg, total, p = RiskSettings(risk="pass_at_k", level="question", k=3), 0.0, 0.3
    for right in range(7):
        rewards = (torch.arange(6) < right).double()[None]
        chance = comb(6, right) * p**right * (1 - p) ** (6 - right)
        total += chance * (advantages(rewards, cfg).double() * (rewards - p)).mean().item()
    assert total == pytest.approx(3 * (1 - p) ** 2 * p * (1 - p), rel=1e-5)


def test_fewer_others_than_the_estimate_needs_give_nothing() -> None:
    nan = torch.nan
    rewards = torch.tensor([[1.0, 0.0, nan, nan, nan], [1.0, 0.0, 0.0, 0.0, nan]])
    found = advantages(rewards, {"risk": "pass_at_k", "level": "question", "k": 4})
    assert (found[0] == 0).all()
    assert found[1].tolist() == [4.0, 0, 0, 0, 0], "with the right one among the others no 3 of them are wrong"


def test_ramps_are_as_wide_as_the_rates_are_apart() -> None:
    low, high = torch.tensor(0.3), torch.tensor(0.7)
    rate = torch.tensor([0.0, 0.25, 0.3, 0.34, 0.5, 0.66, 0.7, 0.74, 1.0])
    found = weights.mvar_weight(rate, low, high, 1.0, 0.1)
    expected = [2, 2, 1.5, 1.1, 1, 0.9, 0.5, 0.1, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    sharp = weights.mvar_weight(rate, low, high, 1.0)
    np.testing.assert_allclose(sharp, [2, 2, 1.5, 1, 1, 1, 0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(weights.cvar_weight(rate, low, 0.2, 0.1), [5, 5, 2.5, 0.5, 0, 0, 0, 0, 0], atol=1e-5)


def question_mvar(rewards: np.ndarray, low: float, high: float, omega: float) -> np.ndarray:
    """One answer after the other, in plain Python."""
    out, spread = np.zeros_like(rewards), np.nanmax(rewards) - np.nanmin(rewards)
    for question, row in enumerate(rewards):
        for place, own in enumerate(row):
            others = [value for other, value in enumerate(row) if other != place and not np.isnan(value)]
            if np.isnan(own) or not others:
                continue
            rate, width = np.mean(others), spread / len(others)
            below = [min(max((knot - rate) / width + 0.5, 0), 1) for knot in (low, high)]
            out[question, place] = (omega * below[0] + below[1]) * (own - rate)
    return out


@pytest.mark.parametrize("best", [1.0, 3.0])
def test_the_question_level_answer_by_answer(best: float) -> None:
    rng = np.random.default_rng(1)
    rewards = best * (rng.random((12, 6)) < rng.random((12, 1)))
    rewards[2, 1], rewards[5, 1:], rewards[7] = np.nan, np.nan, np.nan
    found = risk_advantages(torch.from_numpy(rewards), RiskSettings(level="question"))
    means = np.sort([np.nanmean(row) for row in rewards if not np.isnan(row).all()])
    low, high = means[2], means[8]  # of 11: the 3rd holds .2, the 9th .8
    assert (found.metrics["q_alpha"], found.metrics["q_beta"]) == pytest.approx((low, high))
    np.testing.assert_allclose(found.advantages, question_mvar(rewards, low, high, 0.5), atol=1e-6)


def test_the_tracker_sees_mean_rewards() -> None:
    settings = RiskSettings(level="question")
    tracker = make_tracker(settings)
    advantages(torch.tensor([[1.0, 0.0, float("nan")], [1.0, 1.0, 1.0], [float("nan")] * 3]), settings, tracker)
    assert tracker.atoms.tolist() == [0.5, 1.0]


def test_hard_questions_weigh_more_at_question_level() -> None:
    torch.manual_seed(0)
    rewards = (torch.rand(400, 16) < torch.linspace(0.05, 0.95, 400)[:, None]).float()
    found = advantages(rewards, {"level": "question"})
    plain = advantages(rewards, {"level": "question", "risk": "mean"})
    shares = [found[part].norm() / plain[part].norm() for part in torch.arange(400).chunk(5)]
    assert shares[0] > 1.25 and 0.9 < shares[2] < 1.1 and shares[4] < 0.6


def test_the_mean_is_leave_one_out() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    assert advantages(rewards, {"level": "question", "risk": "mean"})[0].tolist() == pytest.approx(
        [2 / 3, -2 / 3, -2 / 3, 2 / 3]
    )


def test_the_entropic_weight_does_not_overflow() -> None:
    values = torch.tensor([-800.0, 0.0, 900.0], dtype=torch.float64)
    found = weights.entropic_weight(values, 2.0, values)
    assert found.isfinite().all() and found[0].item() == pytest.approx(3)
