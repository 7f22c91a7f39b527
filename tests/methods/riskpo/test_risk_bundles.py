"""Bundles use every answer once, come back, and depend on (seed, step) alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.methods.riskpo.bundles import Bundling, bundle, generator

STRATEGIES = ("random", "stratified", "anti_stratified")


def made(
    count: int, size: int, generations: int, strategy: str = "random", seed: int = 0, step: int = 0, hard=None
) -> Bundling:
    hard = torch.zeros(count * size) if hard is None else hard
    return bundle(count * size, generations, size, strategy=strategy, difficulty=hard, seed=seed, step=step)


@given(
    count=st.integers(1, 6),
    size=st.integers(1, 6),
    generations=st.integers(1, 7),
    strategy=st.sampled_from(STRATEGIES),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_every_answer_is_used_once_and_comes_back(
    count: int, size: int, generations: int, strategy: str, seed: int
) -> None:
    questions = count * size
    found = made(count, size, generations, strategy, seed, hard=torch.randn(questions))
    answers = torch.arange(questions * generations).view(questions, generations)
    gathered = found.gather(answers)
    assert gathered.shape == (count, size, generations)
    assert gathered.flatten().sort().values.tolist() == list(range(questions * generations))
    # A row of a bundle is one question, in every copy.
    assert ((gathered // generations) == found.members[..., None]).all()
    assert torch.equal(found.scatter(gathered), answers)


def test_the_pairing_is_drawn_question_by_question() -> None:
    found = made(20, 5, 8)
    assert (found.pairing.sort(1).values == torch.arange(8)).all()
    assert len({tuple(row) for row in found.pairing.tolist()}) > 95, "100 of 40320 permutations hardly ever coincide"
    places = torch.stack([made(20, 5, 8, step=step).pairing for step in range(40)]).flatten(0, 1).double()
    assert (places.mean(0) - 3.5).abs().max() < 0.2, "every answer is as likely in every copy"


def test_only_seed_and_step_decide() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = made(4, 5, 6, seed=3, step=7)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    again = made(4, 5, 6, seed=3, step=7)
    assert torch.equal(first.members, again.members) and torch.equal(first.pairing, again.pairing)
    for other in (made(4, 5, 6, seed=4, step=7), made(4, 5, 6, seed=3, step=8), made(4, 5, 6, seed=7, step=3)):
        assert not torch.equal(first.members, other.members)
        assert not torch.equal(first.pairing, other.pairing)


def test_streams_steps_and_seeds_are_unrelated() -> None:
    first = {
        float(torch.rand((), generator=generator(seed, step, stream), dtype=torch.float64))
        for seed in range(20)
        for step in range(20)
        for stream in range(4)
    }
    assert len(first) == 1600
    assert sum(first) / 1600 == pytest.approx(0.5, abs=0.03)


def test_stratified_bundles_are_alike_and_the_others_span() -> None:
    hard = torch.randperm(30, generator=torch.Generator().manual_seed(5)).double()
    alike = hard[made(6, 5, 2, "stratified", hard=hard).members]
    assert sorted(alike.max(1).values.tolist()) == [4, 9, 14, 19, 24, 29]
    assert (alike.max(1).values - alike.min(1).values == 4).all()
    spanning = hard[made(6, 5, 2, "anti_stratified", hard=hard).members]
    assert torch.equal((spanning // 6).sort(1).values, torch.arange(5).double().expand(6, 5))
    mates = {
        tuple(row)
        for step in range(5)
        for row in made(6, 5, 2, "anti_stratified", step=step, hard=hard).members.tolist()
    }
    assert len(mates) > 20, "who shares a bundle changes from step to step"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equally_hard_questions_meet_at_random(strategy: str) -> None:
    pairs = {tuple(sorted(row)) for step in range(60) for row in made(4, 2, 2, strategy, step=step).members.tolist()}
    assert len(pairs) == 28, "all pairs of 8 questions"


def test_questions_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ValueError, match="12 questions are not a multiple of the bundle size 5"):
        bundle(12, 4, 5, strategy="random", difficulty=torch.zeros(12), seed=0, step=0)
