"""A model that has read a prompt and goes on from it as often as wanted: the prompt is read once."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.methods.evaluation.measure import last_logits_alone

log = logging.getLogger(__name__)

PROBE = (9, 4)
"""Tokens of a prompt and behind it by which a model's cache is tried."""


class Prefix:
    """One sequence that was read so far, with the model's cache of it.

    Attributes:
        last: [V] logits of the token that comes next, in the model's precision.
    """

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


class Reread(Prefix):
    """A prefix without a cache: whatever is read on, all of it is read again."""

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
        prefix.fork().feed(ids[: more + 1])
        cached = prefix.feed(ids[prompt:], more)
        if torch.allclose(cached.float(), whole.float(), rtol=2e-2, atol=2e-2 * whole.float().std().item()):
            return Prefix
        reason = "gives other logits than a pass over the whole text"
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = f"cannot go on by several tokens ({error})"
    log.warning("needle: the cache of %s %s: every answer is read with its whole prompt, which is slow", name, reason)
    return Reread


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
