"""The metrics against a reference in double precision that never chunks."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.methods.evaluation.metrics import Sums, bootstrap_interval, score_window, summarise

TOKENS, VOCABULARY = 67, 101


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a model and of its baseline `[T, V]`, targets `[T]`."""
    generator = torch.Generator().manual_seed(0)
    model = 4 * torch.randn(TOKENS, VOCABULARY, generator=generator)
    baseline = model + torch.randn(TOKENS, VOCABULARY, generator=generator)
    return model, baseline, torch.randint(VOCABULARY, (TOKENS,), generator=generator)


def reference(model: torch.Tensor, baseline: torch.Tensor, targets: torch.Tensor) -> Sums:
    """The definitions, token by token, in double precision."""
    nll = baseline_nll = kl = 0.0
    top1 = 0
    for row, other, target in zip(model.double(), baseline.double(), targets.tolist(), strict=True):
        p, b = torch.softmax(row, -1), torch.softmax(other, -1)
        nll -= math.log(p[target])
        baseline_nll -= math.log(b[target])
        kl += sum(float(y) * math.log(float(y) / float(x)) for x, y in zip(p, b, strict=True))
        top1 += int(row.argmax() == other.argmax())
    return Sums(len(targets), nll, baseline_nll, kl, top1)


@pytest.mark.parametrize("chunk", [1, 16, 67, 1000])
def test_sums_equal_the_reference_at_every_chunk_size(logits, chunk: int) -> None:
    model, baseline, targets = logits
    found = score_window(targets, lambda rows: model[rows], lambda rows: baseline[rows], chunk)
    expected = reference(model, baseline, targets)
    assert found.tokens == TOKENS and found.top1 == expected.top1
    for name in ("nll", "baseline_nll", "kl"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6), name


def test_never_more_rows_than_a_chunk_are_asked_for(logits) -> None:
    model, _, targets = logits
    asked = []
    score_window(targets, lambda rows: asked.append(rows) or model[rows], chunk_tokens=10)
    assert [rows.start for rows in asked] == list(range(0, TOKENS, 10)) and asked[-1].stop == TOKENS


def test_large_and_half_precision_logits_stay_finite(logits) -> None:
    model, baseline, targets = logits
    found = score_window(targets, lambda rows: 1e4 * model[rows], lambda rows: baseline[rows].bfloat16())
    assert math.isfinite(found.nll) and math.isfinite(found.kl)


def test_without_a_baseline_nothing_is_compared(logits) -> None:
    model, _, targets = logits
    found = score_window(targets, lambda rows: model[rows])
    assert (found.baseline_nll, found.kl, found.top1) == (None, None, None)
    figures = summarise([found, found], text_bytes=10, samples=100, seed=0)
    assert not any(name.startswith("baseline_") or name in ("kl", "top1_agreement") for name in figures)


def test_totals_are_weighted_by_tokens_not_by_documents() -> None:
    documents = [Sums(1, 5.0, 4.0, 1.0, 1), Sums(9, 9.0, 8.0, 0.5, 6)]
    figures = summarise(documents, text_bytes=20, samples=100, seed=0)
    assert figures["nll"] == pytest.approx(1.4) and figures["perplexity"] == pytest.approx(math.exp(1.4))
    assert figures["baseline_perplexity"] == pytest.approx(math.exp(1.2))
    assert figures["kl"] == pytest.approx(0.15) and figures["top1_agreement"] == pytest.approx(0.7)
    assert figures["bits_per_byte"] == pytest.approx(14 / math.log(2) / 20)
    assert figures["nll_gap"] == pytest.approx(0.2)


def test_intervals_are_seeded_paired_and_hold_the_value() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(30, generator=generator).tolist()
    documents = [Sums(10, 10 * (2 + 2 * x), 10 * (1.9 + 2 * x), 1 + x, 7) for x in noise]
    figures = summarise(documents, text_bytes=100, samples=500, seed=3)
    assert figures == summarise(documents, text_bytes=100, samples=500, seed=3)
    assert figures["perplexity_low"] < figures["perplexity"] < figures["perplexity_high"]
    assert figures["kl_low"] < figures["kl"] < figures["kl_high"]
    # Every document loses the same 0.1 nats, so the paired interval has no width though perplexities differ widely.
    assert figures["nll_gap_low"] == pytest.approx(0.1) and figures["nll_gap_high"] == pytest.approx(0.1)


def test_the_interval_has_about_the_width_that_theory_gives() -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(400, generator=generator).tolist()
    low, high = bootstrap_interval(values, [1] * 400, samples=2000, seed=0)
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)


def test_one_document_has_no_interval() -> None:
    assert bootstrap_interval([1.0], [3], samples=100, seed=0) is None
