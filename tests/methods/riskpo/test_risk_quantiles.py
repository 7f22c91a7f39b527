"""Trackers find the quantiles of a stream, say when they have none yet, and survive a round trip through JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from posttrain.methods.riskpo import RiskSettings, Tracker, make_tracker
from posttrain.methods.riskpo.quantiles import LEVELS, EmaHistogram, SgdQuantiles, inverse_cdf

PMF = np.array([0.1, 0.15, 0.3, 0.25, 0.12, 0.08])
SOURCES = ("ema_hist", "tracked", "batch", "bundle")


def stream(steps: int, size: int = 1000, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield torch.from_numpy(rng.choice(6, size=size, p=PMF).astype(float))


def inverse(level: float) -> int:
    return int(np.searchsorted(np.cumsum(PMF), level))


def asked(tracker: Tracker, alpha: float, beta: float) -> tuple[float, float]:
    low, high, from_batch = tracker.quantiles(alpha, beta, torch.zeros(1, 1))
    assert not from_batch
    return float(low), float(high)


def test_the_histogram_finds_the_atoms() -> None:
    tracker = EmaHistogram(0.9)
    for scores in stream(60):
        tracker.update(scores)
    # Levels well inside a step of the CDF: .1 .25 .55 .8 .92 1
    for level in (0.05, 0.2, 0.4, 0.7, 0.85, 0.97):
        assert asked(tracker, level, 0.99)[0] == inverse(level)
    assert tracker.atoms.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(tracker.weights / tracker.weights.sum(), PMF, atol=0.02)


def test_the_histogram_is_the_decayed_mean_of_the_steps() -> None:
    tracker, expected = EmaHistogram(0.7), np.zeros(6)
    for scores in stream(8, size=50):
        tracker.update(scores.view(5, 10))
        expected = 0.7 * expected + 0.3 * np.bincount(scores.long().numpy(), minlength=6) / 50
    np.testing.assert_allclose(tracker.weights, expected, atol=1e-12)


def test_a_step_counts_the_same_whatever_its_size() -> None:
    tracker = EmaHistogram(0.5)
    tracker.update(torch.zeros(1))
    tracker.update(torch.ones(1000))
    np.testing.assert_allclose(tracker.weights / tracker.weights.sum(), [1 / 3, 2 / 3])


def test_forgotten_atoms_are_dropped() -> None:
    tracker = EmaHistogram(0.5)
    tracker.update(torch.tensor([7.0]))
    for _ in range(25):
        tracker.update(torch.tensor([1.0]))
    assert tracker.atoms.tolist() == [1.0]


def test_rounding_errors_make_no_atoms() -> None:
    tracker = EmaHistogram()
    tracker.update(torch.tensor([0.1 + 0.2, 0.3, 3.0], dtype=torch.float64))
    assert tracker.atoms.tolist() == [0.3, 3.0]


def test_continuous_scores_keep_a_bounded_histogram() -> None:
    tracker, rng = EmaHistogram(), np.random.default_rng(0)
    for _ in range(10):
        tracker.update(torch.from_numpy(rng.normal(size=3000)))
    assert len(tracker.atoms) <= 4096
    low, high = asked(tracker, 0.2, 0.8)
    assert (low, high) == pytest.approx((-0.8416, 0.8416), abs=0.05)
    assert tracker.weights.sum().item() == pytest.approx(1 - 0.9**10)
    assert (tracker.atoms.diff() > 0).all()


def test_stochastic_approximation_stays_within_a_step_of_the_atom() -> None:
    tracker = SgdQuantiles(0.1)
    for scores in stream(400):
        tracker.update(scores)
        assert (tracker.values.diff() >= 0).all(), "levels do not cross"
    for level in LEVELS:
        if np.abs(np.cumsum(PMF) - level).min() > 0.02:
            assert abs(asked(tracker, level, 0.95)[0] - inverse(level)) <= 0.1 + 1e-9, level


def test_stochastic_approximation_step_by_step() -> None:
    tracker, seen = SgdQuantiles(0.3), list(stream(4, size=40))
    tracker.update(seen[0])
    values = np.quantile(seen[0].numpy(), LEVELS)
    np.testing.assert_allclose(tracker.values, values, atol=1e-12)
    for scores in seen[1:]:
        below = (scores.numpy()[None] < values[:, None]).mean(1)
        values = np.sort(values + 0.3 * (np.array(LEVELS) - below))
        tracker.update(scores)
    np.testing.assert_allclose(tracker.values, values, atol=1e-12)
    assert asked(tracker, 0.21, 0.88) == (values[3], values[17]), "the nearest levels, .2 and .9"


def test_levels_that_cross_are_sorted() -> None:
    tracker = SgdQuantiles(5.0)
    for scores in stream(20, size=7):
        tracker.update(scores)
        assert (tracker.values.diff() >= 0).all()


@pytest.mark.parametrize("source", SOURCES)
def test_the_first_step_takes_its_own_quantiles_and_says_so(source: str) -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0, 9.0]])
    tracker = make_tracker(RiskSettings(quantile_source=source))
    low, high, from_batch = tracker.quantiles(0.2, 0.8, scores)
    assert from_batch
    if source == "bundle":
        expected = np.quantile(scores.numpy(), [0.2, 0.8], axis=1)
        np.testing.assert_allclose(torch.cat([low, high], 1).T, expected)
    else:
        assert (float(low), float(high)) == (1.0, 5.0), "the 2nd and the 8th of ten"


@pytest.mark.parametrize("source", ("ema_hist", "tracked"))
def test_a_state_goes_through_json(source: str) -> None:
    cfg = RiskSettings(quantile_source=source)
    one, other = make_tracker(cfg), make_tracker(cfg)
    seen = list(stream(6, size=30))
    for scores in seen[:3]:
        one.update(scores)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for scores in seen[3:]:
        one.update(scores)
        other.update(scores)
        assert asked(one, 0.2, 0.8) == asked(other, 0.2, 0.8)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize("source", SOURCES)
def test_no_scores_change_nothing(source: str) -> None:
    tracker = make_tracker(RiskSettings(quantile_source=source))
    tracker.update(torch.empty(0))
    assert tracker.quantiles(0.2, 0.8, torch.ones(1, 2))[2], "still from the batch"
    tracker.update(torch.tensor([1.0, 2.0]))
    before = tracker.state_dict()
    tracker.update(torch.empty(0))
    assert tracker.state_dict() == before


def test_settings_reach_the_trackers() -> None:
    assert make_tracker(RiskSettings(hist_decay=0.3)).decay == 0.3
    assert make_tracker(RiskSettings(quantile_source="tracked", quantile_lr=0.7)).lr == 0.7


def test_the_inverse_cdf_takes_the_lower_atom_where_it_is_flat() -> None:
    atoms = torch.arange(5).double()
    found = [float(inverse_cdf(atoms, torch.ones(5).double(), level)) for level in (0, 0.2, 0.200001, 0.6, 0.8, 1.0)]
    assert found == [0, 0, 1, 2, 3, 4]
    # Five times 0.7 makes shares that are a rounding error below a fifth.
    weights = torch.full((5,), 0.7, dtype=torch.float64)
    assert [float(inverse_cdf(atoms, weights, level)) for level in (0.2, 0.4, 0.6, 0.8)] == [0, 1, 2, 3]
