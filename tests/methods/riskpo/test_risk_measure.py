"""The score functions are the gradients of their risk measures: against differences, autograd and other formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.methods.riskpo import RiskSettings, measure

ALPHA, BETA, OMEGA = 0.2, 0.8, 0.5


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def integral(atoms: np.ndarray, masses: np.ndarray, level: float) -> float:
    """Integral of the quantile function up to `level`, filling from the worst atom on."""
    left, total = level, 0.0
    for place in np.argsort(atoms):
        taken = min(left, masses[place])
        total, left = total + taken * atoms[place], left - taken
    return total


def mvar_by_hand(atoms: np.ndarray, masses: np.ndarray, a: float, b: float, w: float) -> float:
    tail, body = integral(atoms, masses, a), integral(atoms, masses, b)
    return (1 + w) * tail + body - tail


def quantile(atoms: np.ndarray, masses: np.ndarray, level: float) -> float:
    order = np.argsort(atoms)
    return atoms[order][np.searchsorted(np.cumsum(masses[order]), level)]


def differences(function, logits: np.ndarray, step: float = 1e-6) -> np.ndarray:
    shifts = step * np.eye(len(logits))
    return np.array([(function(logits + shift) - function(logits - shift)) / (2 * step) for shift in shifts])


def bandit(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seven arms, some of them with the same reward, whose cumulated masses keep away from both levels."""
    while True:
        logits, atoms = rng.normal(size=7), np.round(rng.normal(size=7), 1)
        masses = softmax(logits)
        heights = np.cumsum(masses[np.argsort(atoms)])
        if np.abs(heights[:, None] - [ALPHA, BETA]).min() > 1e-3:
            return logits, atoms


def score_gradient(phi: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """E[phi grad log pi] of a softmax, exactly."""
    return masses * (phi - (masses * phi).sum())


def test_the_closed_form_is_the_gradient_of_mvar() -> None:
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(200):
        logits, atoms = bandit(rng)
        masses = softmax(logits)
        low, high = (quantile(atoms, masses, level) for level in (ALPHA, BETA))
        phi = measure.mvar_score(torch.from_numpy(atoms), low, high, OMEGA).numpy()
        expected = differences(lambda x, a=atoms: mvar_by_hand(a, softmax(x), ALPHA, BETA, OMEGA), logits)
        worst = max(worst, np.abs(score_gradient(phi, masses) - expected).max())
    assert worst < 1e-8


def test_autograd_through_the_sorted_atoms_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        logits, atoms = bandit(rng)
        masses = softmax(logits)
        leaf = torch.tensor(logits, requires_grad=True)
        value = measure.mvar(torch.from_numpy(atoms), leaf.softmax(0), ALPHA, BETA, OMEGA)
        assert value.item() == pytest.approx(mvar_by_hand(atoms, masses, ALPHA, BETA, OMEGA), abs=1e-12)
        value.backward()
        low, high = (quantile(atoms, masses, level) for level in (ALPHA, BETA))
        phi = measure.mvar_score(torch.from_numpy(atoms), low, high, OMEGA).numpy()
        np.testing.assert_allclose(leaf.grad.numpy(), score_gradient(phi, masses), atol=1e-12)


@pytest.mark.parametrize("name", ["cvar", "entropic"])
def test_the_other_scores_are_gradients_too(name: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        logits, atoms = bandit(rng)
        masses = softmax(logits)
        values = torch.from_numpy(atoms)
        if name == "cvar":
            phi = measure.cvar_score(values, quantile(atoms, masses, ALPHA), ALPHA)
            expected = differences(lambda x, a=atoms: integral(a, softmax(x), ALPHA) / ALPHA, logits)
            found = measure.cvar(values, torch.from_numpy(masses), ALPHA).item()
            assert found == pytest.approx(integral(atoms, masses, ALPHA) / ALPHA, abs=1e-12)
        else:
            # The reference is a sample with the distribution's own frequencies.
            counts = np.round(masses * 1e6).astype(int)
            masses = counts / counts.sum()
            logits = np.log(masses)
            phi = measure.entropic_score(values, 1.7, torch.from_numpy(np.repeat(atoms, counts)))
            expected = differences(lambda x, a=atoms: -np.log((softmax(x) * np.exp(-1.7 * a)).sum()) / 1.7, logits)
            found = measure.entropic(values, torch.from_numpy(masses), 1.7).item()
            assert found == pytest.approx(-np.log((masses * np.exp(-1.7 * atoms)).sum()) / 1.7, abs=1e-12)
            assert (masses * phi.numpy()).sum() == pytest.approx(0, abs=1e-12)
        np.testing.assert_allclose(score_gradient(phi.numpy(), masses), expected, atol=1e-8)


@pytest.mark.parametrize("risk", ["mvar", "none", "cvar", "entropic", "mean"])
def test_the_settings_choose_the_score(risk: str) -> None:
    scores, low, high = torch.linspace(-1, 6, 29, dtype=torch.float64), torch.tensor(1.5), torch.tensor(4.0)
    form = {"baseline": "none"} if risk == "none" else {"risk": risk, "temperature": 1.7, "alpha": 0.3, "omega": 2.0}
    found = measure.score_function(RiskSettings(**form), low, high, scores)(scores).numpy()
    values = scores.numpy()
    expected = {
        "mvar": -3.0 * np.clip(1.5 - values, 0, None) + np.clip(values, 1.5, 4.0) - 4.0,
        "none": -1.5 * np.clip(1.5 - values, 0, None) + np.clip(values, 1.5, 4.0) - 1.5,
        "cvar": -np.clip(1.5 - values, 0, None) / 0.3,
        "entropic": (1 - np.exp(-1.7 * values) / np.exp(-1.7 * values).mean()) / 1.7,
        "mean": values,
    }
    np.testing.assert_allclose(found, expected[risk], atol=1e-12)


def test_the_entropic_score_does_not_overflow() -> None:
    scores = torch.tensor([-2000.0, 0.0, 3000.0], dtype=torch.float64)
    assert measure.entropic_score(scores, 5.0, scores).isfinite().all()


finite = st.floats(-50, 50).map(lambda value: round(value, 3))


@given(scores=st.lists(finite, min_size=1, max_size=20), knots=st.tuples(finite, finite), omega=st.floats(0, 4))
@settings(max_examples=200, deadline=None)
def test_phi_is_never_positive_and_has_the_slopes_of_the_card(
    scores: list[float], knots: tuple[float, float], omega: float
) -> None:
    low, high = sorted(knots)
    values = torch.tensor(scores, dtype=torch.float64)
    phi = measure.mvar_score(values, low, high, omega)
    assert (phi <= 1e-12).all()
    assert (phi[values >= high] == 0).all()
    excess = (values - low).clamp(min=0) - (values - high).clamp(min=0) + low - high  # the paper's g
    expected = excess - (1 + omega) * (low - values).clamp(min=0)
    torch.testing.assert_close(phi, expected, atol=1e-12, rtol=1e-12)
    if omega == 0:
        torch.testing.assert_close(phi, -(high - values).clamp(min=0), atol=1e-12, rtol=0)


def test_slopes_and_continuity_at_both_knots() -> None:
    def phi(score: float) -> float:
        return measure.mvar_score(torch.tensor(score, dtype=torch.float64), 1.0, 3.0, OMEGA).item()

    assert phi(1.0) == -2.0 and phi(3.0) == 0.0 and phi(9.0) == 0.0
    assert phi(0.5) - phi(0.0) == pytest.approx(0.5 * 1.5)
    assert phi(2.5) - phi(1.5) == pytest.approx(1.0)
    for knot in (1.0, 3.0):
        assert phi(knot + 1e-9) - phi(knot - 1e-9) == pytest.approx(0, abs=4e-9)


def test_without_extra_weight_phi_is_one_sided() -> None:
    scores = torch.linspace(-3, 8, 57, dtype=torch.float64)
    phi = measure.mvar_score(scores, 1.0, 4.0, 0.0)
    torch.testing.assert_close(phi, -(4.0 - scores).clamp(min=0), atol=1e-15, rtol=0)


def test_quantiles_broadcast_by_row() -> None:
    scores = torch.arange(6, dtype=torch.float64).view(2, 3)
    low, high = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [5.0]])
    both = measure.mvar_score(scores, low, high, OMEGA)
    rows = [measure.mvar_score(scores[row], low[row].item(), high[row].item(), OMEGA) for row in (0, 1)]
    assert torch.equal(both, torch.stack(rows))


def test_the_whole_range_gives_the_gradient_of_the_mean() -> None:
    rng = np.random.default_rng(3)
    logits, atoms = bandit(rng)
    masses = softmax(logits)
    phi = measure.mvar_score(torch.from_numpy(atoms), atoms.min(), atoms.max(), 0.0).numpy()
    np.testing.assert_allclose(score_gradient(phi, masses), score_gradient(atoms, masses), atol=1e-15)


def test_measures_of_a_known_distribution() -> None:
    atoms, masses = torch.tensor([5.0, 0.0, 2.0]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    assert measure.rvar(atoms, masses, 0.25, 0.75).item() == pytest.approx((0.25 * 2 + 0.25 * 5) / 0.5)
    assert measure.cvar(atoms, masses, 0.5).item() == pytest.approx(1.0)
    assert measure.mvar(atoms, masses, 0.5, 0.75, 1.0).item() == pytest.approx(2 * 0.5 + 0.25 * 5)
    zero = measure.mvar(atoms, masses, 0.25, 0.75, 0.0).item()
    assert zero == pytest.approx(0.75 * measure.cvar(atoms, masses, 0.75).item()), "not the RVaR, as is said elsewhere"


@given(mixture=st.floats(0.1, 5), alpha=st.floats(0.05, 0.45), beta=st.floats(0.5, 1.0))
@settings(max_examples=100, deadline=None)
def test_the_two_weights_convert(mixture: float, alpha: float, beta: float) -> None:
    omega = measure.omega_of_mixture(mixture, alpha, beta)
    assert measure.mixture_of_omega(omega, alpha, beta) == pytest.approx(mixture)
    scores, low, high = np.linspace(-2, 7, 40), 1.0, 4.0
    body = np.clip(scores - low, 0, None) - np.clip(scores - high, 0, None) + low - high
    tail = -np.clip(low - scores, 0, None)
    released = (mixture * tail / alpha + body / (beta - alpha)) / (mixture + 1)
    ours = measure.mvar_score(torch.from_numpy(scores), low, high, omega).numpy()
    np.testing.assert_allclose(released * (beta - alpha) * (mixture + 1), ours, atol=1e-9)


def test_the_conversions_of_the_released_scripts() -> None:
    assert measure.omega_of_mixture(1.5, 0.2, 0.8) == pytest.approx(3.5)
    assert measure.omega_of_mixture(1.5, 0.2, 0.9) == pytest.approx(4.25)
