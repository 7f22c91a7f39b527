"""pass@k against exact fractions and enumeration; intervals, pairs and verdicts."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from posttrain.methods.evaluation.intervals import NO_DIFFERENCE, TOO_FEW
from posttrain.methods.evaluation.pass_at_k import pass_at_k, pass_figures


def exact(n: int, correct: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - correct, k), math.comb(n, k))


def test_every_small_case_equals_the_exact_fraction() -> None:
    for n in range(1, 25):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                assert pass_at_k(n, correct, k) == pytest.approx(float(exact(n, correct, k)), rel=1e-14, abs=0.0)


@pytest.mark.parametrize(("n", "correct", "k"), [(10**6, 1, 2), (100_000, 3, 50), (5000, 2500, 100), (1000, 1, 999)])
def test_many_samples_neither_overflow_nor_lose_digits(n: int, correct: int, k: int) -> None:
    assert pass_at_k(n, correct, k) == pytest.approx(float(exact(n, correct, k)), rel=1e-12, abs=0.0)


def test_it_is_the_share_of_choices_that_hold_a_right_answer() -> None:
    answers = [1, 0, 0, 1, 0, 0, 0]
    for k in range(1, 8):
        choices = list(itertools.combinations(answers, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_it_is_unbiased() -> None:
    """Over all outcomes of n draws at rate p the mean is 1 - (1 - p)^k, which the plug-in estimate misses."""
    n, k, p = 6, 3, Fraction(1, 5)
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = math.fsum(float(weight) * pass_at_k(n, c, k) for c, weight in enumerate(weights))
    assert mean == pytest.approx(float(1 - (1 - p) ** k), rel=1e-13)
    plug_in = math.fsum(float(weight) * (1 - (1 - c / n) ** k) for c, weight in enumerate(weights))
    assert abs(plug_in - mean) > 0.02


@pytest.mark.parametrize(("n", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_numbers_are_refused(n: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="right answers among"):
        pass_at_k(n, correct, k)


def test_intervals_and_the_paired_difference() -> None:
    generator = random.Random(0)
    baseline = [generator.randint(0, 6) for _ in range(60)]
    model = [count + 2 for count in baseline]
    found = pass_figures({"model": model, "baseline": baseline}, 8, (1, 4), 500, seed=3)
    assert found["model"]["pass@1"] == pytest.approx(sum(model) / 480)
    assert found["model"]["pass@4"] == pytest.approx(sum(float(exact(8, c, 4)) for c in model) / 60)
    difference = found["difference"]
    # Each problem gained the same: paired there is no spread, though each model's own interval is wide.
    assert difference["pass@1"] == pytest.approx(0.25) == difference["pass@1_low"] == difference["pass@1_high"]
    assert difference["pass@1_verdict"] == "better"
    for name in ("model", "baseline"):
        low, high = found[name]["pass@1_low"], found[name]["pass@1_high"]
        assert low < found[name]["pass@1"] < high and high - low > 0.08
    turned = pass_figures({"model": baseline, "baseline": model}, 8, (1,), 500, seed=3)["difference"]
    assert turned["pass@1_verdict"] == "worse" and turned["pass@1"] == pytest.approx(-0.25)
    assert found == pass_figures({"model": model, "baseline": baseline}, 8, (1, 4), 500, seed=3)
    assert found != pass_figures({"model": model, "baseline": baseline}, 8, (1, 4), 500, seed=4)


def test_a_difference_within_the_noise_is_not_detected() -> None:
    generator = random.Random(1)
    counts = {name: [generator.randint(0, 8) for _ in range(40)] for name in ("model", "baseline")}
    difference = pass_figures(counts, 8, (1,), 500, seed=0)["difference"]
    assert difference["pass@1_low"] <= 0 <= difference["pass@1_high"]
    assert difference["pass@1_verdict"] == NO_DIFFERENCE
    same = pass_figures({"model": [0] * 5, "baseline": [0] * 5}, 8, (1,), 500, seed=0)["difference"]
    assert same["pass@1_verdict"] == NO_DIFFERENCE


def test_one_problem_has_no_interval_and_one_model_no_difference() -> None:
    found = pass_figures({"model": [3], "baseline": [1]}, 4, (1,), 500, seed=0)
    assert found["model"] == {"pass@1": 0.75}
    assert found["difference"] == {"pass@1": 0.5, "pass@1_verdict": TOO_FEW}
    assert set(pass_figures({"model": [3, 1]}, 4, (1,), 500, seed=0)) == {"model"}
