"""A model that has read a prompt and goes on from it as often as wanted: the prompt is read once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.methods.evaluation.config import WIDE_BYTES
from posttrain.methods.evaluation.measure import last_logits_alone

log = logging.getLogger(__name__)

PROBE = (9, 4)
"""Tokens of a prompt and behind it by which a model's cache is tried."""


class Prefix:
    """One sequence that was read so far, with the model's cache of it.

    Attributes:
        last: [V] logits of the token that comes next, in the model's precision.
        wide: whether several continuations may be read side by side, each with a copy of the cache.
    """

    wide = True

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.cache: Any = None
        self.last: torch.Tensor
        self.feed(ids)

    @torch.no_grad()
    def feed(self, ids: Sequence[int], rows: int = 1) -> torch.Tensor:
        """Read on, one token at least; logits [rows, V] behind the last `rows` of them."""
        tokens = torch.tensor([list(ids)], device=self.device)
        output = self.model(
            input_ids=tokens, past_key_values=self.cache, use_cache=True, **last_logits_alone(self.model, rows)
        )
        self.cache = output.past_key_values
        logits = output.logits[0, -rows:]
        self.last = logits[-1]
        return logits

    @torch.no_grad()
    def fork(self) -> Prefix:
        """The same prefix with a cache of its own: what is read on there is not seen here."""
        return copy.copy(self)._with_cache(copy.deepcopy(self.cache))

    def _with_cache(self, cache: Any) -> Prefix:
        self.cache = cache
        return self

    @torch.no_grad()
    def beside(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [rows, n, V] behind every token of `rows`, all n long, each read on from here; nothing is kept."""
        tokens = torch.tensor([list(row) for row in rows], device=self.device)
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(tokens.new_zeros(len(rows)))
        return self.model(
            input_ids=tokens, past_key_values=cache, use_cache=True, **last_logits_alone(self.model, tokens.shape[1])
        ).logits[:, -tokens.shape[1] :]

    def places(self) -> int:
        """How many continuations are read at once: by the cache's size alone, as results shall depend on no other."""
        held = sum(_bytes(vars(layer)) for layer in getattr(self.cache, "layers", ())) if self.wide else 0
        return max(1, WIDE_BYTES // held) if held else 1


class Narrow(Prefix):
    """A prefix whose cache cannot be laid side by side."""

    wide = False


class Reread(Prefix):
    """A prefix without a cache: whatever is read on, all of it is read again."""

    wide = False

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        super().__init__(model, ids)

    @torch.no_grad()
    def feed(self, ids: Sequence[int], rows: int = 1) -> torch.Tensor:
        self.ids = [*self.ids, *ids]
        tokens = torch.tensor([self.ids], device=self.device)
        logits = self.model(input_ids=tokens, use_cache=False, **last_logits_alone(self.model, rows)).logits[0, -rows:]
        self.last = logits[-1]
        return logits


def prefix_class(name: str, model: Any) -> type[Prefix]:
    """How to go on from a prompt of this model: by its cache, if a few tokens behind one come out as they should."""
    prompt, more = PROBE
    ids = [number % model.config.vocab_size for number in range(prompt + more)]
    whole = Reread(model, ids[:prompt]).feed(ids[prompt:], more)
    try:
        prefix = Prefix(model, ids[:prompt])
        other = Reread(model, ids[:prompt]).feed(ids[:more], more)
        wide = _beside(prefix, [ids[prompt:], ids[:more]])
        prefix.fork().feed(ids[: more + 1])
        cached = prefix.feed(ids[prompt:], more)
        if _alike(cached, whole):
            return Prefix if wide is not None and _alike(wide, torch.stack((whole, other))) else Narrow
        reason = "gives other logits than a pass over the whole text"
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = f"cannot go on by several tokens ({error})"
    log.warning("needle: the cache of %s %s: every answer is read with its whole prompt, which is slow", name, reason)
    return Reread


def _bytes(held: Any) -> int:
    """Of all tensors in a layer's cache: keys and values as such, states in lists or dictionaries."""
    if isinstance(held, torch.Tensor):
        return held.nbytes
    inner = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    return sum(map(_bytes, inner))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-2 * other.float().std().item())


def _beside(prefix: Prefix, rows: Sequence[Sequence[int]]) -> torch.Tensor | None:
    """`beside`, or None of a model or cache that cannot."""
    try:
        return prefix.beside(rows)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return None


def logprobs(prefix: Prefix, keys: Sequence[Sequence[int]]) -> list[float]:
    """`logprob` of each, read side by side where the cache can be: padded behind, where nothing looks back at it."""
    longest, places = max(map(len, keys)) - 1, prefix.places()
    if longest == 0 or places == 1:
        return [logprob(prefix, tokens) for tokens in keys]
    found: list[float] = []
    for start in range(0, len(keys), places):
        group = keys[start : start + places]
        logits = prefix.beside([[*tokens[:-1], *tokens[-1:] * (longest - len(tokens) + 1)] for tokens in group])
        first = prefix.last.expand(len(group), 1, -1)
        log_p = torch.log_softmax(torch.cat((first, logits), 1).float(), -1)  # [rows, n, V]
        for row, tokens in zip(log_p, group, strict=True):
            own = row[: len(tokens)].gather(-1, torch.tensor(list(tokens), device=row.device)[:, None])
            found.append(own.double().sum().item())
    return found


def logprob(prefix: Prefix, tokens: Sequence[int]) -> float:
    """log p(tokens | prefix) in nats, of all tokens together; log-probabilities in fp32, their sum in fp64."""
    logits = prefix.last[None]
    if len(tokens) > 1:
        logits = torch.cat((logits, prefix.fork().feed(tokens[:-1], len(tokens) - 1)))
    log_p = torch.log_softmax(logits.float(), -1)  # [n, V]
    return log_p.gather(-1, torch.tensor(list(tokens), device=log_p.device)[:, None]).double().sum().item()


def greedy(prefix: Prefix, most: int, stop: Sequence[int]) -> list[int]:
    """The most likely next tokens one by one, up to a stop token, which is left out, or `most`."""
    going, found = prefix.fork(), []
    while (token := int(going.last.argmax())) not in stop:
        found.append(token)
        if len(found) == most:
            break
        going.feed([token])
    return found
