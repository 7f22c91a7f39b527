"""Credit rules: unbiasedness, variance, the collapse theorem, the released formulas, answers without a reward."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from posttrain.methods.riskpo import RiskSettings, credit, risk_advantages
from posttrain.methods.riskpo.bundles import bundle, generator
from posttrain.methods.riskpo.measure import mvar_score

RATES = np.array([0.02, 0.2, 0.5, 0.8, 0.95])
LOW, HIGH, OMEGA = 2.0, 3.0, 0.5


def phi_of(score: float) -> float:
    return -(1 + OMEGA) * max(LOW - score, 0) + min(max(score, LOW), HIGH) - HIGH


def phi(scores: torch.Tensor) -> torch.Tensor:
    return mvar_score(scores, LOW, HIGH, OMEGA)


def draws(step: int = 0) -> torch.Generator:
    return generator(0, step, 3)


def exact_weights(rates: np.ndarray, function: Callable[[float], float] = phi_of) -> np.ndarray:
    """Expectation of phi(S + 1) - phi(S) over all outcomes of the other questions, one by one."""
    weights = np.zeros(len(rates))
    for own in range(len(rates)):
        others = np.delete(rates, own)
        for outcome in itertools.product((0, 1), repeat=len(others)):
            chance = np.prod(np.where(outcome, others, 1 - others))
            weights[own] += chance * (function(sum(outcome) + 1) - function(sum(outcome)))
    return weights


def gradients(rule: str, rounds: int, seed: int) -> np.ndarray:
    """`[rounds, 5]` estimates of d E phi / d logit of five Bernoulli questions, in the card's setting G = 10."""
    torch.manual_seed(seed)
    rates = torch.from_numpy(RATES)
    rewards = (torch.rand(rounds * 5, 10, dtype=torch.float64) < rates.repeat(rounds)[:, None]).double()
    grouped = rewards.view(rounds, 5, 10)
    scores = grouped.sum(1)
    shares = credit.rb(phi, grouped, draws()) if rule == "rb" else credit.RULES[rule](phi(scores), grouped)
    return (shares * (grouped - rates[:, None])).mean(2).numpy()


def test_shared_and_rb_are_unbiased_and_rb_has_less_noise() -> None:
    rounds = 20_000
    exact = exact_weights(RATES) * RATES * (1 - RATES)
    found = {rule: gradients(rule, rounds, seed=1) for rule in ("shared", "rb")}
    for rule, values in found.items():
        error = values.std(0, ddof=1) / np.sqrt(rounds)
        assert (np.abs(values.mean(0) - exact) < 4 * error).all(), rule
    noise = {rule: values.std(0) for rule, values in found.items()}
    assert (noise["rb"][1:] < noise["shared"][1:]).all()
    assert (noise["shared"] / noise["rb"])[2] > 2, "the medium question gains most"


def test_the_weights_are_those_of_all_outcomes() -> None:
    """Sample pass rates in place of the true ones: the Poisson-binomial sum, by enumeration."""
    rng = np.random.default_rng(0)
    rewards = (rng.random((3, 5, 8)) < rng.random((3, 5, 1))).astype(float)
    found = credit.rb(phi, torch.from_numpy(rewards), draws()).numpy()
    for bundle_rewards, shares in zip(rewards, found, strict=True):
        weights = exact_weights(bundle_rewards.mean(1))
        others = (bundle_rewards.sum(1, keepdims=True) - bundle_rewards) / 7
        np.testing.assert_allclose(shares, weights[:, None] * (bundle_rewards - others), atol=1e-12)
        assert (shares * (bundle_rewards - others) >= 0).all(), "always the right sign"


def expected_phi(rewards: np.ndarray, own: int, answer: int) -> float:
    """Mean of phi over every choice of the other questions' answers."""
    others = [rewards[question] for question in range(len(rewards)) if question != own]
    return float(np.mean([phi_of(rewards[own, answer] + sum(choice)) for choice in itertools.product(*others)]))


def rb_by_hand(rewards: np.ndarray) -> np.ndarray:
    values = np.array([[expected_phi(rewards, q, a) for a in range(rewards.shape[1])] for q in range(len(rewards))])
    count = rewards.shape[1]
    return values - (values.sum(1, keepdims=True) - values) / (count - 1)


@pytest.mark.parametrize("levels", [(0.0, 0.5, 1.0), (-1.0, 1.0), (0.0, 0.3, 1.0), (-0.25, 2.75)])
def test_rewards_on_a_lattice_are_convolved_exactly(levels: tuple[float, ...]) -> None:
    rewards = np.random.default_rng(4).choice(levels, size=(2, 4, 5))
    found = credit.rb(phi, torch.from_numpy(rewards), draws()).numpy()
    np.testing.assert_allclose(found, np.stack([rb_by_hand(one) for one in rewards]), atol=1e-9)


def test_other_rewards_are_sampled_near_the_exact_value() -> None:
    rewards = np.random.default_rng(5).random((1, 4, 5)) * 1.5
    assert credit.lattice_of(torch.from_numpy(rewards)) is None
    found = torch.stack([credit.rb(phi, torch.from_numpy(rewards), draws(step)) for step in range(100)]).numpy()
    exact = rb_by_hand(rewards[0])
    error = found.std(0, ddof=1) / 10
    assert (np.abs(found.mean(0) - exact) < 4.5 * error + 1e-9).all()
    assert np.abs(found - exact).max() < 0.35
    assert torch.equal(credit.rb(phi, torch.from_numpy(rewards), draws(7)), torch.from_numpy(found[7]))


@pytest.mark.parametrize(
    ("rewards", "lattice"),
    [
        ([0.0, 1.0, torch.nan], (0.0, 1.0, 2)),
        ([1.0, -1.0], (-1.0, 2.0, 2)),
        ([0.0, 0.3, 1.0], (0.0, 0.1, 11)),
        ([2.0, 2.0], (2.0, 1.0, 1)),
        ([0.0, 64.0, 1.0], (0.0, 1.0, 65)),
        ([0.0, 65.0, 1.0], None),
        ([0.0, 0.5, 0.5001], None),
    ],
)
def test_the_coarsest_lattice_is_found(rewards: list[float], lattice: tuple[float, float, int] | None) -> None:
    found = credit.lattice_of(torch.tensor(rewards, dtype=torch.float64))
    assert found == (None if lattice is None else pytest.approx(lattice))


def bundlings(strategy: str, rounds: int) -> torch.Tensor:
    """`[rounds * 40, 5]`: 200 questions with pass rates 0 to 1 in bundles of five, `rounds` times."""
    hard = -torch.linspace(0, 1, 200)
    made = (bundle(200, 1, 5, strategy=strategy, difficulty=hard, seed=9, step=step) for step in range(rounds))
    return torch.cat([one.members for one in made])


def quantiles_of(strategy: str) -> tuple[float, float]:
    """Quantiles at .2 and .8 of the bundles' sums, by convolution."""
    pmf = np.zeros(6)
    for rates in np.linspace(0, 1, 200)[bundlings(strategy, 50).numpy()]:
        one = np.ones(1)
        for rate in rates:
            one = np.convolve(one, [1 - rate, rate])
        pmf += one
    low, high = np.searchsorted(np.cumsum(pmf / pmf.sum()), [0.2, 0.8])
    return float(low), float(high)


def mean_weights(strategy: str, rounds: int, low: float, high: float) -> np.ndarray:
    """`[200]`: rb's weight of each question at its true pass rates, over `rounds` bundlings."""
    members, rates = bundlings(strategy, rounds), torch.linspace(0, 1, 200, dtype=torch.float64)
    others = credit.sums_of_others(torch.stack([1 - rates, rates], 1)[members])
    steps = mvar_score(torch.arange(6, dtype=torch.float64), low, high, OMEGA).diff()
    total = torch.zeros(200, dtype=torch.float64).index_add_(0, members.flatten(), (others @ steps).flatten())
    return (total / rounds).numpy()


def test_random_bundles_collapse_to_the_mean_reward() -> None:
    low, high = quantiles_of("random")
    weights = mean_weights("random", 4000, low, high)
    binomial = np.array([1, 4, 6, 4, 1]) / 16  # the other four, each right with chance 1/2
    slopes = np.where(np.arange(5) < low, 1.5, np.where(np.arange(5) < high, 1.0, 0.0))
    assert weights.mean() == pytest.approx((binomial * slopes).sum(), rel=0.02)
    assert weights.std() / weights.mean() < 0.02


def fifths(strategy: str, low: float, high: float, rounds: int = 1) -> np.ndarray:
    """Mean weight of the five classes of difficulty, the hardest first."""
    return mean_weights(strategy, rounds, low, high).reshape(5, 40).mean(1)


def test_stratified_bundles_weigh_hard_questions_more() -> None:
    own = fifths("stratified", *quantiles_of("stratified"))
    assert (np.diff(own) < -0.1).all() and own[0] / own[4] > 3
    # The card's figures are those of stratified bundles under the quantiles of random ones.
    low, high = quantiles_of("random")
    np.testing.assert_allclose(fifths("stratified", low, high), [1.46, 1.24, 0.91, 0.48, 0.08], atol=0.1)


def test_spanning_bundles_weigh_easy_questions_more() -> None:
    found = fifths("anti_stratified", *quantiles_of("anti_stratified"), rounds=200)
    assert (np.diff(found) > 0.03).all() and found[4] / found[0] > 1.5


def released(rewards: np.ndarray, cfg: RiskSettings, mixture: float, natural: bool) -> np.ndarray:
    """The released estimator on one bundle `[B, G]`, copies in the stored order, in numpy."""
    papers = rewards.sum(0)
    low, high = np.quantile(papers, [cfg.alpha, cfg.beta])
    body = np.clip(papers - low, 0, None) - np.clip(papers - high, 0, None) + (low - high if natural else 0)
    body = body / (cfg.beta - cfg.alpha + 1e-6)
    tail = -np.clip(low - papers, 0, None) / (cfg.alpha + 1e-6)
    paper = (mixture * tail + body) / (mixture + 1) / (papers.std(ddof=1) + 1e-6)
    if cfg.credit == "std":
        deviation = rewards.std(1, ddof=1, keepdims=True)
        return paper / (np.where(deviation > 1e-3, deviation, 1.0) + 1e-6)
    if cfg.credit == "score":
        return paper * np.where(rewards > 0, 0.5, 1.5)
    if cfg.credit == "uniform":
        return np.broadcast_to(paper, rewards.shape)
    centred = rewards - rewards.mean(1, keepdims=True)
    total = centred.sum(0)
    equal = paper / len(rewards) * np.ones_like(rewards)
    return np.where(np.abs(total) > 1e-6, paper * centred / np.where(total == 0, 1, total), equal)


@pytest.mark.parametrize("rule", ["sum_mean", "std", "score", "uniform"])
@pytest.mark.parametrize("natural", [True, False])
def test_the_released_estimator_up_to_its_constant(rule: str, natural: bool) -> None:
    rng, beta = np.random.default_rng(6), 0.9
    cfg = RiskSettings(
        beta=beta, omega=4.25, credit=rule, baseline="natural" if natural else "none", quantile_source="bundle",
        scale="bundle_std", bundle_size=5,
    )  # fmt: skip
    for step in range(20):
        rewards = (rng.random((5, 10)) < rng.random((5, 1))).astype(float)
        found = risk_advantages(torch.from_numpy(rewards), cfg, seed=1, step=step).advantages.double()
        order = bundle(5, 10, 5, strategy="random", difficulty=torch.zeros(5), seed=1, step=step)
        ours = order.gather(found)[0].numpy() / (0.7 * 2.5)
        theirs = released(order.gather(torch.from_numpy(rewards))[0].numpy(), cfg, 1.5, natural)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sum_mean_shares_equally_where_nobody_stands_out() -> None:
    rewards = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]], dtype=torch.float64)
    found = credit.sum_mean(torch.tensor([[-0.6, -2.0]], dtype=torch.float64), rewards)
    assert found.tolist() == [[[-0.3, -1.0], [-0.3, -1.0]]]


def test_a_question_that_always_fails_gets_noise_from_shared_and_nothing_from_rb() -> None:
    rewards = torch.cat([torch.zeros(1, 1, 6), torch.tensor([[0, 1, 0, 1, 1, 0]]).expand(1, 4, 6)], 1).double()
    found = credit.rb(phi, rewards, draws())
    assert (found[0, 0] == 0).all() and (found[0, 1:] != 0).all()
    assert credit.shared(phi(rewards.sum(1)), rewards)[0, 0].std() > 0


def test_leave_one_out_and_deviation_skip_the_missing() -> None:
    nan = torch.nan
    values = torch.tensor([[1.0, 2.0, nan, 6.0], [nan, 5.0, nan, nan], [nan] * 4], dtype=torch.float64)
    assert credit.leave_one_out(values).tolist() == [[1 - 4, 2 - 3.5, 0, 6 - 1.5], [0.0] * 4, [0.0] * 4]
    assert credit.nanstd(values).flatten().tolist() == pytest.approx([np.std([1, 2, 6], ddof=1), 0, 0])


@pytest.mark.parametrize("binary", [True, False])
def test_a_question_without_rewards_is_one_drawn_from_the_batch(binary: bool) -> None:
    torch.manual_seed(0)
    rewards = torch.rand(1, 2, 6, dtype=torch.float64)
    rewards = (rewards < 0.25).double() if binary else rewards
    unknown = torch.cat([rewards, torch.full((1, 1, 6), torch.nan)], 1)
    found = torch.stack([credit.rb(phi, unknown, draws(step)) for step in range(1 if binary else 200)]).mean(0)
    assert (found[0, 2] == 0).all()
    values, pool = rewards[0].numpy(), rewards.flatten().numpy()
    assert not binary or 0.05 < pool.mean() < 0.45, "not as many right as wrong answers"
    for own, other in ((0, 1), (1, 0)):
        expected = np.array([np.mean([phi_of(r + s + t) for s in values[other] for t in pool]) for r in values[own]])
        expected = (expected - expected.mean()) * 6 / 5
        np.testing.assert_allclose(found[0, own], expected, atol=1e-12 if binary else 0.02)
