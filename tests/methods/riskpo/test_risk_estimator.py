"""The estimator as a trainer calls it: GRPO as a special case, missing rewards, trackers, settings in every form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from trl.trainer.utils import nanstd

import posttrain.methods.riskpo as riskpo
from posttrain.methods.riskpo import PRESETS, RiskSettings, advantages, make_tracker, risk_advantages
from posttrain.methods.riskpo.bundles import bundle
from posttrain.methods.riskpo.measure import mvar_score

NAN = float("nan")
PAPER = RiskSettings(**PRESETS["paper"]["risk"])


def rewards_of(questions: int, generations: int, seed: int = 0, missing: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    values = (rng.random((questions, generations)) < rng.random((questions, 1))).astype(np.float32)
    values[rng.random(values.shape) < missing] = NAN
    return torch.from_numpy(values)


def grpo(rewards: torch.Tensor) -> torch.Tensor:
    centred = rewards - rewards.nanmean(1, keepdim=True)
    return (centred / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)).nan_to_num(0.0)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("kind", ["binary", "graded", "all equal", "negative"])
def test_neutral_is_grpo(kind: str, missing: float) -> None:
    rewards = rewards_of(24, 8, 1, missing)
    if kind == "graded":
        rewards = rewards + torch.rand(24, 8, generator=torch.Generator().manual_seed(0))
    if kind == "all equal":
        rewards = rewards * 0 + 1
    if kind == "negative":
        rewards = 2 * rewards - 1
    settings = RiskSettings(**PRESETS["neutral"]["risk"])
    tracker = make_tracker(settings)
    tracker.update(torch.zeros(3))
    for step in range(2):
        found = advantages(rewards, settings, tracker, step=step)
        torch.testing.assert_close(found, grpo(rewards), atol=1e-6, rtol=1e-6)


def test_neutral_holds_for_tracked_quantiles_that_lag() -> None:
    """At the levels 0 and 1 nothing is cut off, whatever the history: all scores so far were 0."""
    settings = RiskSettings(**{**PRESETS["neutral"]["risk"], "quantile_source": "ema_hist"})
    tracker = make_tracker(settings)
    tracker.update(torch.zeros(50))
    rewards = 2 * rewards_of(10, 6) - 1
    torch.testing.assert_close(advantages(rewards, settings, tracker), grpo(rewards), atol=1e-6, rtol=1e-6)
    # No share of the scores is extra weighted at alpha=0, those below all earlier ones neither.
    weighted, late = settings.model_copy(update={"omega": 3.0}), make_tracker(settings)
    late.update(torch.zeros(50))
    torch.testing.assert_close(advantages(rewards, weighted, late), grpo(rewards), atol=1e-6, rtol=1e-6)


def shared_by_hand(rewards: np.ndarray, step: int, low: float, high: float) -> np.ndarray:
    """The paper's rule with a loop over bundles and copies."""
    questions, generations = rewards.shape
    made = bundle(
        questions, generations, 5, strategy="random", difficulty=torch.zeros(questions), seed=0, step=step
    )  # fmt: skip
    mean = np.array([np.nanmean(row) if not np.isnan(row).all() else np.nanmean(rewards) for row in rewards])
    out = np.zeros_like(rewards)
    for members, copy in itertools.product(made.members.tolist(), range(generations)):
        places = [(question, int(made.pairing[question, copy])) for question in members]
        total = sum(mean[q] if np.isnan(rewards[q, a]) else rewards[q, a] for q, a in places)
        phi = -1.5 * max(low - total, 0) + min(max(total, low), high) - high
        for place in places:
            out[place] = 0.0 if np.isnan(rewards[place]) else phi
    return out


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_the_paper_bundle_by_bundle(missing: float) -> None:
    rewards = rewards_of(20, 6, 2, missing)
    rewards[3] = NAN if missing else rewards[3]
    tracker = make_tracker(PAPER)
    tracker.update(torch.arange(101) / 20.0)
    for step in range(3):
        low, high, _ = tracker.quantiles(0.2, 0.8, torch.zeros(1))
        found = risk_advantages(rewards, PAPER, tracker, step=step)
        expected = shared_by_hand(rewards.double().numpy(), step, float(low), float(high))
        np.testing.assert_allclose(found.advantages, expected, atol=1e-6)
        assert (found.metrics["q_alpha"], found.metrics["q_beta"]) == (float(low), float(high))


def test_the_tracker_is_asked_before_it_is_told() -> None:
    rewards = rewards_of(20, 6, 3)
    tracker = make_tracker(RiskSettings())
    first = risk_advantages(rewards, RiskSettings(), tracker)
    assert first.metrics["quantiles_from_batch"] == 1
    assert torch.equal(first.advantages, advantages(rewards, RiskSettings(), make_tracker(RiskSettings())))
    assert torch.equal(first.advantages, advantages(rewards, RiskSettings())), "as without a tracker"
    before = tracker.quantiles(0.2, 0.8, torch.zeros(1))
    second = risk_advantages(rewards * 0 + 1, RiskSettings(), tracker, step=1)
    assert second.metrics["quantiles_from_batch"] == 0
    assert (second.metrics["q_alpha"], second.metrics["q_beta"]) == (float(before[0]), float(before[1]))
    assert float(tracker.quantiles(0.2, 0.99, torch.zeros(1))[1]) == 5, "the second batch is in there now"


def test_every_rank_and_a_resumed_run_agree() -> None:
    settings, batches = RiskSettings(), [rewards_of(10, 4, seed) + torch.rand(10, 4) for seed in range(4)]
    tracker, copy = make_tracker(settings), make_tracker(settings)
    whole = [advantages(rewards, settings, tracker, seed=5, step=step) for step, rewards in enumerate(batches)]
    for step in (0, 1):
        advantages(batches[step], settings, copy, seed=5, step=step)
    resumed = make_tracker(settings)
    resumed.load_state_dict(copy.state_dict())
    torch.rand(3)
    for step in (2, 3):
        assert torch.equal(advantages(batches[step], settings, resumed, seed=5, step=step), whole[step])


def test_imputed_sums_are_not_shown_to_the_tracker() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0], [1.0, NAN, 0.0]])
    tracker = make_tracker(RiskSettings())
    advantages(rewards, {"bundle_size": 2}, tracker)
    assert set(tracker.atoms.tolist()) <= {0.0, 1.0, 2.0}, "and not 1.5"
    assert tracker.weights.sum().item() == pytest.approx(0.1)
    advantages(torch.full((2, 3), NAN), {"bundle_size": 2}, tracker)
    assert tracker.weights.sum().item() == pytest.approx(0.1), "no reward, no update"


FORMS: list[dict[str, Any]] = [
    *({"credit": rule} for rule in ("rb", "shared", "sum_mean", "std", "uniform", "score")),
    *({"credit": "shared", "baseline": baseline} for baseline in ("copy_mean", "none")),
    *({"quantile_source": source} for source in ("tracked", "batch", "bundle")),
    *({"scale": scale} for scale in ("group_std", "batch_std", "quantile_range")),
    *({"bundles": strategy} for strategy in ("stratified", "anti_stratified")),
    *({"risk": risk} for risk in ("cvar", "entropic", "mean")),
    *({"risk": risk, "level": "question"} for risk in ("mvar", "cvar", "entropic", "pass_at_k", "mean")),
    {"level": "question", "scale": "quantile_range"},
    {"level": "question", "scale": "batch_std"},
    *(preset["risk"] for preset in PRESETS.values()),
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_every_form_gives_finite_advantages_and_metrics(form: dict[str, Any], missing: float) -> None:
    rewards = rewards_of(20, 6, 7, missing)
    rewards[0], rewards[1] = 0.0, 1.0
    rewards[2] = NAN if missing else 0.0
    settings = RiskSettings(**form)
    tracker = make_tracker(settings)
    for step in range(3):
        found = risk_advantages(rewards, settings, tracker, step=step)
        assert found.advantages.shape == rewards.shape and found.advantages.dtype == torch.float32
        assert found.advantages.isfinite().all() and found.advantages.abs().max() < 50
        assert (found.advantages[rewards.isnan()] == 0).all()
        assert found.advantages.any()
        assert np.isfinite(list(found.metrics.values())).all()
        if settings.level == "question" or settings.credit == "rb":
            assert (found.advantages[:3] == 0).all(), "all fail, all pass, all missing"


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, NAN])
def test_a_batch_of_equal_rewards_is_harmless(form: dict[str, Any], value: float) -> None:
    settings = RiskSettings(**form)
    tracker = make_tracker(settings)
    for step in range(3):
        found = advantages(torch.full((10, 4), value), settings, tracker, step=step)
        assert found.abs().max() < 10
    tracker.update(torch.rand(50) * 5)
    assert advantages(torch.full((10, 4), value), settings, tracker, step=4).abs().max() < 20


@pytest.mark.parametrize("form", [{}, {"credit": "shared"}, {"level": "question"}], ids=str)
def test_one_answer_or_one_bundle(form: dict[str, Any]) -> None:
    single = advantages(rewards_of(10, 1), form)
    assert single.shape == (10, 1)
    if form != {"credit": "shared"}:
        assert not single.any(), "one answer has no others to compare with"
    assert advantages(rewards_of(10, 4), {**form, "bundle_size": 10}).isfinite().all()
    assert advantages(rewards_of(7, 4), {**form, "bundle_size": 1}).isfinite().all()


def test_where_nearly_all_bundles_fail_there_is_no_gradient() -> None:
    """Both quantiles are 0, from where on phi is flat; with beta=1 the few right answers count."""
    rewards = torch.zeros(50, 10)
    rewards[:6, 0] = 1
    assert not advantages(rewards, {}).any() and not advantages(rewards, PAPER).any()
    assert advantages(rewards, {"beta": 1.0}).any() and advantages(rewards, {"risk": "mean"}).any()


def test_scales_divide() -> None:
    rewards = rewards_of(20, 6, 9)
    plain = advantages(rewards, {}).double()
    scores = bundle(20, 6, 5, strategy="random", difficulty=torch.zeros(20), seed=0, step=0).gather(rewards).sum(1)
    low, high = np.quantile(scores.numpy(), [0.2, 0.8], method="inverted_cdf")
    expected = {
        "batch_std": plain / scores.double().std(),
        "quantile_range": plain / (high - low),
        "group_std": plain / (rewards.double().std(1, keepdim=True) + 1e-4),
    }
    for scale, values in expected.items():
        torch.testing.assert_close(advantages(rewards, {"scale": scale}).double(), values, atol=1e-5, rtol=1e-5)


def test_copy_mean_and_none_shift_the_natural_baseline() -> None:
    rewards = rewards_of(10, 6, 11)
    natural, none, centred = (
        advantages(rewards, {"credit": "shared", "baseline": baseline}) for baseline in ("natural", "none", "copy_mean")
    )
    found = risk_advantages(rewards, RiskSettings()).metrics
    torch.testing.assert_close(none - natural, torch.full_like(none, found["q_beta"] - found["q_alpha"]))
    torch.testing.assert_close(centred, natural - natural.mean(1, keepdim=True)), "every question is in every copy"
    assert (natural <= 0).all() and (none < 0).any() and (none > 0).any()


def test_difficulty_decides_who_shares_a_bundle() -> None:
    rewards = rewards_of(20, 6, 13)
    hard = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    given = risk_advantages(rewards, RiskSettings(credit="shared", bundles="stratified"), difficulty=hard)
    made = bundle(20, 6, 5, strategy="stratified", difficulty=hard, seed=0, step=0)
    # A bundle's copies share phi: five equal columns.
    grouped = made.gather(given.advantages)
    assert torch.equal(grouped, grouped[:, :1].expand_as(grouped))
    own = risk_advantages(rewards, RiskSettings(credit="shared", bundles="stratified"))
    made = bundle(20, 6, 5, strategy="stratified", difficulty=-rewards.mean(1), seed=0, step=0)
    grouped = made.gather(own.advantages)
    assert torch.equal(grouped, grouped[:, :1].expand_as(grouped)), "without it, the batch's pass rates"


def test_metrics_are_counted() -> None:
    rewards = rewards_of(20, 6, 15)
    rewards[4, 2] = NAN
    tracker = make_tracker(PAPER)
    tracker.update(torch.tensor([1.0, 2.0, 3.0, 3.5]))
    found = risk_advantages(rewards, PAPER, tracker).metrics
    filled = torch.where(rewards.isnan(), rewards.nanmean(1, keepdim=True), rewards).double()
    scores = bundle(20, 6, 5, strategy="random", difficulty=torch.zeros(20), seed=0, step=0).gather(filled).sum(1)
    low, high = np.quantile([1.0, 2.0, 3.0, 3.5], [0.2, 0.8])
    expected = {
        "nan_share": 1 / 120,
        "zero_std_questions": sum(len({x for x in row.tolist() if x == x}) == 1 for row in rewards) / 20,
        "phi_mean": mvar_score(scores, low, high, 0.5).mean().item(),
        "q_alpha": low,
        "q_beta": high,
        "score_mean": scores.mean().item(),
        "share_below": (scores < low).double().mean().item(),
        "share_above": (scores > high).double().mean().item(),
        "quantiles_from_batch": 0.0,
    }
    assert found == pytest.approx(expected)
    assert 0 < found["share_below"] < 1 and 0 < found["share_above"] < 1


class Stage(BaseModel):
    lr: float = 1.0
    risk: RiskSettings = PAPER


def test_settings_come_in_every_form() -> None:
    rewards = rewards_of(10, 4, 17)
    expected = advantages(rewards, PAPER)
    assert not torch.equal(expected, advantages(rewards, {}))
    for form in (
        PRESETS["paper"]["risk"], {"preset": "paper"}, Stage(), Stage().model_dump(), {"lr": 1.0, "risk": PAPER},
    ):  # fmt: skip
        assert torch.equal(advantages(rewards, form), expected), form
    assert torch.equal(advantages(rewards, {"risk": "cvar"}), advantages(rewards, RiskSettings(risk="cvar")))


@pytest.mark.parametrize(
    ("rewards", "config", "sentence"),
    [
        (torch.zeros(12, 4), {}, "12 questions are not a multiple of bundle_size=5"),
        (torch.zeros(12), {}, "not of shape"),
        (torch.zeros(0, 4), {}, "not of shape"),
        (torch.tensor([[1.0, float("inf")]]), {"bundle_size": 1}, "finite"),
        (torch.zeros(5, 3), {"risk": "pass_at_k", "level": "question", "k": 4}, "at least as many answers"),
        (torch.full((5, 4), 0.5), {"risk": "pass_at_k", "level": "question"}, "rewards 0 and 1"),
    ],
)
def test_what_cannot_be_computed_is_refused(rewards: torch.Tensor, config: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        advantages(rewards, config)


def test_the_rewards_are_left_alone() -> None:
    rewards = rewards_of(10, 4, 19, 0.2).requires_grad_()
    before = rewards.detach().clone()
    found = advantages(rewards, {})
    assert torch.equal(rewards.detach(), before.detach()) or torch.allclose(rewards, before, equal_nan=True)
    assert not found.requires_grad


def test_the_public_names() -> None:
    assert {"advantages", "mvar_score", "RiskSettings", "risk_advantages", "make_tracker"} <= set(riskpo.__all__)
    assert all(getattr(riskpo, name) is not None for name in riskpo.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = riskpo.nothing
