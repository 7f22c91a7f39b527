"""The mathematics of the evaluation: sums over a window of tokens, and the figures made of those sums.

All sums are over scored tokens t, with p the model and b the baseline, both conditioned on the window before t:

    nll  = - sum_t log p(x_t)                         perplexity     = exp(nll / tokens)
    kl   = sum_t sum_v b_t(v) (log b_t(v) - log p_t(v))   top1_agreement = share of t with argmax p_t = argmax b_t
    bits_per_byte = nll / (ln 2 * UTF-8 bytes of the scored text), which does not depend on the tokenizer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

LogitsOf = Callable[[slice], torch.Tensor]
"""Logits `[n, V]` of the window positions in that slice."""


@dataclass(frozen=True)
class Sums:
    """Sums over the scored tokens of one window or document; the last three are None without a baseline."""

    tokens: int
    nll: float
    baseline_nll: float | None = None
    kl: float | None = None
    top1: int | None = None

    def __add__(self, other: Sums) -> Sums:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Sums(*(None if a is None or b is None else a + b for a, b in pairs))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.inference_mode()
def score_window(
    targets: torch.Tensor, logits: LogitsOf, baseline: LogitsOf | None = None, chunk_tokens: int = 256
) -> Sums:
    """Score the predictions of `targets` `[T]`; position t of `logits` predicts `targets[t]`.

    At most `chunk_tokens` rows of logits exist at once. Log-probabilities are fp32, sums fp64.
    """
    total: Sums | None = None
    for start in range(0, len(targets), chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, len(targets)))
        part = _score_rows(targets[rows], logits(rows), None if baseline is None else baseline(rows))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("a window without targets has no score")
    return total


def _score_rows(targets: torch.Tensor, logits: torch.Tensor, baseline: torch.Tensor | None) -> Sums:
    log_p = torch.log_softmax(logits.float(), dim=-1)  # [n, V]
    nll = _target_nll(log_p, targets)
    if baseline is None:
        return Sums(len(targets), nll)
    log_b = torch.log_softmax(baseline.float(), dim=-1)
    top1 = int((log_p.argmax(-1) == log_b.argmax(-1)).sum())
    baseline_nll = _target_nll(log_b, targets)
    kl = (log_b - log_p).mul_(log_b.exp()).sum(-1).double().sum().item()
    return Sums(len(targets), nll, baseline_nll, kl, top1)


def _target_nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    return -log_probabilities.gather(-1, targets[:, None]).double().sum().item()


def perplexity(nll: float, tokens: float) -> float:
    """`exp(nll / tokens)`. Raises OverflowError beyond 709 nats per token."""
    return math.exp(nll / tokens)


def bootstrap_interval(
    numerators: Sequence[float], tokens: Sequence[int], samples: int, seed: int
) -> tuple[float, float] | None:
    """95 % percentile interval of `sum(numerators) / sum(tokens)` when documents are drawn with replacement.

    None for fewer than two documents: one document says nothing about another.
    """
    count = len(tokens)
    if count < 2:
        return None
    picks = np.random.default_rng(seed).integers(0, count, size=(samples, count))
    ratios = np.asarray(numerators, np.float64)[picks].sum(1) / np.asarray(tokens, np.float64)[picks].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def summarise(documents: Sequence[Sums], text_bytes: int, samples: int, seed: int) -> dict[str, Any]:
    """The figures of a data set from the sums of its documents; token weighted, with intervals by document.

    `*_low` and `*_high` bound 95 % intervals. `nll_gap` is model minus baseline in nats per token, its interval paired
    by document. Keys of the comparison are absent without a baseline.
    """
    total = documents[0]
    for document in documents[1:]:
        total = total + document
    tokens = [document.tokens for document in documents]

    def interval(name: str, values: list[float], transform: Callable[[float], float] = float) -> dict[str, float]:
        bounds = bootstrap_interval(values, tokens, samples, seed)
        return {} if bounds is None else {f"{name}_low": transform(bounds[0]), f"{name}_high": transform(bounds[1])}

    def text_figures(prefix: str, nll: float, values: list[float]) -> dict[str, float]:
        return {
            f"{prefix}perplexity": perplexity(nll, total.tokens),
            **interval(f"{prefix}perplexity", values, lambda mean: perplexity(mean, 1)),
            f"{prefix}nll": nll / total.tokens,
            f"{prefix}bits_per_byte": nll / (math.log(2) * text_bytes),
        }

    figures: dict[str, Any] = {"documents": len(documents), "tokens": total.tokens, "text_bytes": text_bytes}
    figures |= text_figures("", total.nll, [d.nll for d in documents])
    if total.baseline_nll is None or total.kl is None or total.top1 is None:
        return figures
    baseline_nll = [d.baseline_nll or 0.0 for d in documents]
    figures |= text_figures("baseline_", total.baseline_nll, baseline_nll)
    figures["kl"] = total.kl / total.tokens
    figures |= interval("kl", [d.kl or 0.0 for d in documents])
    figures["top1_agreement"] = total.top1 / total.tokens
    figures["nll_gap"] = (total.nll - total.baseline_nll) / total.tokens
    figures |= interval("nll_gap", [d.nll - b for d, b in zip(documents, baseline_nll, strict=True)])
    return figures
