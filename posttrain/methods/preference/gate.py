"""The gate: what a model does on held-out pairs and text, and whether the trained one is better. No trainer in here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from posttrain.training.logprob import plain_head, token_logprobs

if TYPE_CHECKING:
    from datasets import Dataset

    from posttrain.methods.preference.config import PreferenceConfig

Kept = Literal["trained", "input"]

Boundary = Callable[[], None]
"""Called before every batch and document; may end the stage."""


@dataclass(frozen=True)
class PairScores:
    """Log-probabilities of the answers of `N` pairs, fp64 [N]: sums over an answer's tokens, and its tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def margins(self) -> Tensor:
        """Log-probability per token of the chosen answer over that of the rejected one, nats [N]."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class Figures:
    """A model on held-out data; None where that data was not given.

    Attributes:
        pair_accuracy: share of pairs whose chosen answer is likelier per token; `pair_margin`: mean difference, nats.
        chosen_logprob, rejected_logprob: means per token, nats. DPO may lower both.
        perplexity: per token of `gate_text`.
    """

    pair_accuracy: float | None = None
    pair_margin: float | None = None
    chosen_logprob: float | None = None
    rejected_logprob: float | None = None
    perplexity: float | None = None

    @property
    def given(self) -> dict[str, float]:
        """The figures that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def figures(scores: PairScores | None, perplexity: float | None) -> Figures:
    """Figures of the scored pairs and of a perplexity."""
    if scores is None:
        return Figures(perplexity=perplexity)
    return Figures(
        pair_accuracy=float((scores.margins > 0).double().mean()),
        pair_margin=float(scores.margins.mean()),
        chosen_logprob=float((scores.chosen / scores.chosen_tokens).mean()),
        rejected_logprob=float((scores.rejected / scores.rejected_tokens).mean()),
        perplexity=perplexity,
    )


def implicit_rewards(trained: PairScores, reference: PairScores, beta: float) -> dict[str, float]:
    """DPO's own figures of the trained model against its reference: beta times the log-ratios of whole answers."""
    chosen, rejected = trained.chosen - reference.chosen, trained.rejected - reference.rejected
    margins = beta * (chosen - rejected)
    return {"reward_accuracy": float((margins > 0).double().mean()), "reward_margin": float(margins.mean())}


def decide(before: Figures, after: Figures, cfg: PreferenceConfig) -> tuple[Kept, str]:
    """Which model is kept, and why, as a sentence."""
    if cfg.keep == "trained":
        return "trained", "keep=trained: the trained model is kept whatever the figures say"
    if broken := [name for name, value in after.given.items() if not math.isfinite(value)]:
        return "input", f"the trained model's {broken[0]} is not a finite number"
    if before.perplexity is not None:
        limit = before.perplexity * (1 + cfg.gate_max_perplexity_increase)
        if after.perplexity > limit:
            return "input", (
                f"perplexity rose from {before.perplexity:.6g} to {after.perplexity:.6g}, more than "
                f"gate_max_perplexity_increase={cfg.gate_max_perplexity_increase:g} allows"
            )
    names = ("pair_accuracy", "pair_margin") if cfg.gate_metric == "pair_accuracy" else (cfg.gate_metric,)
    for name in names:
        old, new = getattr(before, name), getattr(after, name)
        if new != old:
            better = (new < old) if name == "perplexity" else (new > old)
            said = f"{name} {'rose' if new > old else 'fell'} from {old:.6g} to {new:.6g}"
            return ("trained" if better else "input"), said
    return "input", f"{names[0]} did not change ({getattr(after, names[0]):.6g})"


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel, rows: Dataset, pad: int, pairs_at_once: int, boundary: Boundary = lambda: None
) -> PairScores:
    """Log-probabilities of the answers of all pairs, fp32 per token, summed in fp64."""
    parts = []
    for start in range(0, len(rows), pairs_at_once):
        boundary()
        batch = [rows[index] for index in range(start, min(start + pairs_at_once, len(rows)))]
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids") for row in batch]
        sums, counts = _answer_logprobs(model, sides, pad)
        parts.append(torch.stack([*sums.chunk(2), *counts.chunk(2)]))
    return PairScores(*torch.cat(parts, dim=1))


@torch.no_grad()
def text_perplexity(
    model: PreTrainedModel, documents: Sequence[Sequence[int]], window: int, boundary: Boundary = lambda: None
) -> float:
    """Perplexity per token of documents that are cut into windows; a window's first token is context only."""
    total, count = 0.0, 0
    for document in documents:
        boundary()
        for ids in _windows(document, window):
            sums, counts = _answer_logprobs(model, [(ids[:1], ids[1:])], pad=0)
            total, count = total - float(sums), count + int(counts)
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def _windows(document: Sequence[int], window: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(document), window):
        if len(ids := document[start : start + window]) > 1:
            yield ids


def _answer_logprobs(
    model: PreTrainedModel, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int
) -> tuple[Tensor, Tensor]:
    """Sum of log p over each answer's tokens and their number, fp64 [B] on the CPU, padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.full((len(sequences), width), pad)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(sequences):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        mask[row, :end] = 1
        targets[row, len(prompt) : end] = ids[row, len(prompt) : end]
    ids, mask, targets = (tensor.to(model.device) for tensor in (ids, mask, targets))
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    found = token_logprobs(hidden[:, :-1], plain_head(model), targets[:, 1:], entropy=False).logprobs
    return found.double().sum(1).cpu(), (targets[:, 1:] >= 0).sum(1).double().cpu()
