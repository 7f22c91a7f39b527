"""From logits to tokens: filters, inverse-CDF draws and counter-based random numbers. Pure functions, no host sync.

Legend: B rows, V vocabulary, C chunks of the vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from posttrain.generation.settings import Sampling

__all__ = ["Sampling", "choose", "draw", "filter_logits", "uniforms"]

CHUNK = 256
"""Tokens a chunk of the two-level search: cumulative sums are taken over chunks and inside one, never over V."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def choose(logits: torch.Tensor, sampling: Sampling, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Next token [B] (int64) and its log-probability [B] (fp32) from logits [B, V].

    The log-probability is that of the unfiltered distribution, log softmax(logits / T), T = 1 where greedy: what a
    policy gradient needs. `u` [B], in [0, 1), decides the draw and is not looked at where greedy.
    """
    top = logits.amax(-1, keepdim=True).float()
    scores = logits - top  # fp32 by promotion (fp64 of fp64 logits), largest 0
    if sampling.greedy:
        token = logits.argmax(-1, keepdim=True)
        chosen = scores.gather(-1, token)
        log_total = scores.exp_().sum(-1, keepdim=True).log()
        return token[:, 0], (chosen - log_total)[:, 0].float()
    if sampling.temperature != 1.0:
        scores.div_(sampling.temperature)
    if sampling.filters:
        token = draw(_filtered(scores, sampling), u)[:, None]
    chosen = None if not sampling.filters else scores.gather(-1, token)
    weights = scores.exp_()
    sums = _chunked(weights).sum(-1)  # [B, C]
    if chosen is None:
        token = _search(weights, sums, u)[:, None]
        # Positive, because a token of weight zero is never drawn.
        chosen = weights.gather(-1, token).log()
    return token[:, 0], (chosen - sums.sum(-1, keepdim=True).log())[:, 0].float()


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [B, V] divided by the temperature, with minus infinity where top-k, top-p or min-p drop a token.

    Order and ties as in transformers: temperature, top-k (ties with the k-th stay), top-p, min-p, each on what the
    former left. Greedy settings change nothing.
    """
    if sampling.greedy:
        return logits
    return _filtered(logits / sampling.temperature if sampling.temperature != 1.0 else logits, sampling)


def draw(logits: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One token a row by inversion of the cumulative distribution softmax(logits) at `u` [B] in [0, 1); int64 [B].

    A token of probability zero is never drawn, whatever `u` and the rounding of the sums.
    """
    weights = (logits.float() - logits.amax(-1, keepdim=True).float()).exp_()
    return _search(weights, _chunked(weights).sum(-1), u)


def uniforms(seed: int, row_ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Numbers in [0, 1), fp64 [B, steps], that depend on seed, row id and step alone; the same on every device.

    splitmix64 (Steele, Lea and Flood, 2014) as a hash: seed and row give a stream, the step is its counter. The top 53
    bits count. `row_ids` is int64 [B].
    """
    stream = _mix(_mix(row_ids.new_tensor(_signed(seed)) + _signed(_GOLDEN)) ^ _mix(row_ids * _signed(_GOLDEN) + 1))
    counter = torch.arange(1, steps + 1, device=row_ids.device) * _signed(_GOLDEN)
    bits = _mix(stream[:, None] + counter[None, :])
    return _shifted(bits, 11).to(torch.float64) * 2.0**-53


def _filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = torch.topk(scores, sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = torch.sort(scores, dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    if sampling.min_p > 0.0:
        probabilities = scores.softmax(-1)
        dropped = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        scores = scores.masked_fill(dropped, -torch.inf)
    return scores


def _chunked(weights: torch.Tensor) -> torch.Tensor:
    """[B, V] as [B, C, CHUNK]; the last chunk is filled up with zeros, which are never drawn."""
    missing = -weights.shape[-1] % CHUNK
    return (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, CHUNK))


def _search(weights: torch.Tensor, sums: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The token whose part of the cumulative weights [B, V] holds u times their total; `sums` [B, C] of the chunks."""
    cumulative = sums.double().cumsum(-1)
    target = u.double()[:, None] * cumulative[:, -1:]
    chunk = _first_above(cumulative, target, sums)
    before = cumulative.gather(-1, chunk) - sums.gather(-1, chunk)
    index = chunk * CHUNK + torch.arange(CHUNK, device=weights.device)  # [B, CHUNK]
    inside = weights.gather(-1, index.clamp_max(weights.shape[-1] - 1)) * (index < weights.shape[-1])
    place = _first_above(inside.double().cumsum(-1), target - before, inside)
    return (chunk * CHUNK + place)[:, 0]


def _first_above(cumulative: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """First index of positive weight whose cumulative sum exceeds the target; the last of positive weight if none does.

    Asking for a positive weight matters: sums taken in parallel need not grow monotonically in their last bit, and the
    target can round up to the total.
    """
    index = torch.arange(weights.shape[-1], device=weights.device)
    positive = weights > 0
    first = torch.where(positive & (cumulative > target), index, weights.shape[-1]).amin(-1, keepdim=True)
    last = torch.where(positive, index, 0).amax(-1, keepdim=True)
    return torch.minimum(first, last)


def _signed(value: int) -> int:
    """The 64-bit two's complement of an integer, for torch has no unsigned arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    for shift, factor in _MIX:
        bits = (bits ^ _shifted(bits, shift)) * _signed(factor)
    return bits ^ _shifted(bits, 31)
