"""Filters against transformers' own, draws against their distribution, random numbers against each other."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from posttrain.generation.sampling import CHUNK, Sampling, choose, draw, filter_logits, uniforms
from posttrain.generation.settings import LEAST_TEMPERATURE, MOST_TEMPERATURE

SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 5000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
]


def random_logits(rows: int = 4, vocabulary: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_filters_are_those_of_transformers(settings: dict) -> None:
    logits = random_logits()
    logits[0, :20] = logits[0].max()  # ties
    expected = logits.clone()
    if "temperature" in settings:
        expected = TemperatureLogitsWarper(settings["temperature"])(None, expected)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            expected = warper(settings[name])(None, expected)
    filtered = filter_logits(logits, Sampling(**{"temperature": 1.0, **settings}))
    assert torch.equal(filtered, expected)


def test_greedy_filters_nothing() -> None:
    logits = random_logits()
    assert torch.equal(filter_logits(logits, Sampling(top_k=1)), logits)


@pytest.mark.parametrize("vocabulary", [7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_draws_follow_the_distribution(vocabulary: int) -> None:
    """Chi-square at fixed seeds, tokens pooled into cells of 10 expected draws; threshold: mean + 5 deviations."""
    logits, count = random_logits(1, vocabulary, seed=vocabulary), 40_000
    u = uniforms(1, torch.arange(count), 1)[:, 0]
    tokens = draw(logits.expand(count, -1), u)
    probabilities = logits[0].double().softmax(-1)
    order = probabilities.argsort(descending=True)
    observed = torch.bincount(tokens, minlength=vocabulary).double()[order]
    expected = probabilities[order] * count
    cells = torch.div(expected.cumsum(0), 10, rounding_mode="floor").clamp(max=200).long()
    pooled_o = torch.zeros(201, dtype=torch.double).index_add_(0, cells, observed)
    pooled_e = torch.zeros(201, dtype=torch.double).index_add_(0, cells, expected)
    used = pooled_e >= 5
    chi2 = ((pooled_o - pooled_e) ** 2 / pooled_e.clamp_min(1e-9))[used].sum().item()
    freedom = int(used.sum()) - 1
    assert chi2 < freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = random_logits(64, 1000)
    u = uniforms(5, torch.arange(64), 1)[:, 0]
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = (cumulative <= u[:, None]).sum(-1)
    assert torch.equal(draw(logits, u), expected)


@pytest.mark.parametrize("vocabulary", [5, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2.0**-24, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(vocabulary: int, u: float) -> None:
    for place in range(vocabulary):
        if place not in (0, 1, vocabulary // 2, vocabulary - 1):
            continue
        logits = torch.full((3, vocabulary), -torch.inf)
        logits[:, place] = 3.0
        assert draw(logits, torch.full((3,), u, dtype=torch.float64)).tolist() == [place] * 3
    two = torch.full((1, vocabulary), -torch.inf)
    two[0, 1], two[0, vocabulary - 2] = 0.0, 0.0
    assert draw(two, torch.tensor([u], dtype=torch.float64)).item() in (1, vocabulary - 2)


def test_a_chunk_whose_sum_was_rounded_up_still_gives_one_of_its_tokens() -> None:
    """The target lies behind the chunk's last token then; what follows has probability zero."""
    logits = random_logits(400, 2 * CHUNK)
    logits[:, 200:CHUNK] = logits[:, CHUNK + 100 :] = -torch.inf
    tokens = draw(logits, torch.full((400,), 1 - 2.0**-53, dtype=torch.float64))
    assert logits.gather(-1, tokens[:, None]).isfinite().all()
    assert (tokens == CHUNK + 99).float().mean() > 0.5


def test_many_flat_draws_stay_among_the_kept_tokens() -> None:
    logits = torch.full((2000, 1000), -torch.inf)
    logits[:, ::3] = 0.0
    u = torch.cat((uniforms(0, torch.arange(1990), 1)[:, 0], 1 - 2.0 ** -torch.arange(44, 54, dtype=torch.float64)))
    assert set((draw(logits, u) % 3).tolist()) == {0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 0.6, "top_k": 3}])
def test_log_probabilities_are_those_of_the_unfiltered_distribution(settings: dict, dtype: torch.dtype) -> None:
    sampling, logits = Sampling(**settings), random_logits(16).to(dtype)
    token, logprob = choose(logits, sampling, uniforms(2, torch.arange(16), 1)[:, 0])
    expected = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert token.dtype == torch.int64 and logprob.dtype == torch.float32
    torch.testing.assert_close(logprob, expected, atol=2e-6, rtol=1e-6)
    if sampling.greedy:
        assert torch.equal(token, logits.argmax(-1))


def test_choosing_is_filtering_and_drawing() -> None:
    logits, u = random_logits(200), uniforms(9, torch.arange(200), 1)[:, 0]
    for settings in SETTINGS:
        sampling = Sampling(**{"temperature": 1.0, **settings})
        assert torch.equal(choose(logits, sampling, u)[0], draw(filter_logits(logits, sampling), u)), settings


def test_random_numbers_depend_on_seed_row_and_step_alone() -> None:
    rows = torch.tensor([4, 0, 17, -3])
    table = uniforms(11, rows, 50)
    assert table.shape == (4, 50) and table.dtype == torch.float64
    assert 0 <= table.min() and table.max() < 1
    assert torch.equal(uniforms(11, rows.flip(0), 20), table.flip(0)[:, :20])
    assert not torch.equal(uniforms(12, rows, 50), table)
    assert torch.equal(uniforms(2**64 + 11, rows, 50), table), "seeds count modulo 2^64"
    assert len(set(table.flatten().tolist())) == 200


def test_random_numbers_are_uniform_and_independent_of_their_neighbours() -> None:
    table = uniforms(0, torch.arange(400), 400)
    counts = torch.histc(table.float(), 100, 0, 1)
    assert ((counts - 1600) ** 2 / 1600).sum() < 99 + 5 * 198**0.5
    for first, second in (
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (table, uniforms(1, torch.arange(400), 400)),
    ):
        correlation = torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1]
        assert abs(correlation) < 5 / 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": 1e-46},
        {"temperature": 9e-5},
        {"temperature": 1e40},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"max_new_tokens": 0},
        {"topk": 3},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Sampling(**wrong)


def test_a_temperature_next_to_zero_is_told_about_greedy() -> None:
    with pytest.raises(ValidationError, match="0 = greedy"):
        Sampling(temperature=1e-9)


@pytest.mark.parametrize("temperature", [LEAST_TEMPERATURE, MOST_TEMPERATURE])
@pytest.mark.parametrize("filters", [{}, {"top_k": 9, "top_p": 0.9, "min_p": 0.01}], ids=str)
def test_the_outermost_temperatures_give_numbers(temperature: float, filters: dict) -> None:
    logits = random_logits(400) * 1e4
    logits[:, 7] = -torch.inf
    token, logprob = choose(
        logits, Sampling(temperature=temperature, **filters), uniforms(0, torch.arange(400), 1)[:, 0]
    )
    assert logprob.isfinite().all() and not (token == 7).any()
    if temperature == LEAST_TEMPERATURE:
        assert torch.equal(token, logits.argmax(-1))
