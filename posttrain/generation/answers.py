"""A text for a text: tokens of a conversation, a model that writes, and its words as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError

from posttrain.errors import StageError, fail
from posttrain.generation.engine import DecodeEngine
from posttrain.generation.fallback import generate_by_transformers
from posttrain.generation.settings import Sampling
from posttrain.generation.support import unsupported
from posttrain.generation.tokens import stop_tokens

log = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Cache slots of a conversation where the model allows more: memory is taken at the start, not as the text grows."""

OnText = Callable[[str], None]
Turns = list[dict[str, str]]


class Conversation:
    """Turns with one model, through its chat template; without one, a text that is continued.

    Attributes:
        turns: what was said and answered; a turn that failed is not among them.
        forgotten: turns that were dropped from the beginning because the conversation outgrew the cache.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = MOST_TOKENS) -> None:
        """Allocate the cache of `max_tokens`, or as many as the model has positions.

        Raises:
            StageError: there is no room for a prompt and an answer.
        """
        limit = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, min(max_tokens, limit)
        if self.max_tokens < 2:
            fail(
                f"a conversation of {self.max_tokens} token has no room for a prompt and an answer",
                where="max_position_embeddings in the model's config.json",
                fix="choose another model",
            )
        self.stop = stop_tokens(model, tokenizer)
        self.engine: DecodeEngine | None = None
        if reason := unsupported(model):
            log.warning("answers are written by transformers' generate: the fast decoder does not support %s", reason)
        else:
            self.engine = DecodeEngine(model, 1, self.max_tokens, dtype=model.dtype, share=True)
        self.turns: Turns = []
        self.answers = self.forgotten = 0

    def reset(self) -> None:
        """Forget everything said."""
        self.turns = []

    def ask(self, text: str, sampling: Sampling, on_text: OnText = lambda piece: None) -> str:
        """The answer to the next turn; `on_text` gets it piece by piece.

        The number of the answer is part of the seed: a question asked twice is answered by other draws. A
        KeyboardInterrupt ends the answer, which stays as far as it came.

        Raises:
            StageError: the turn alone is too long for the cache, or the chat template refuses it. As after any other
                error, the conversation is what it was before.
        """
        turns, prompt = self._fitting_prompt([*self.turns, {"role": "user", "content": text}], sampling)
        sampling = sampling.model_copy(
            update={"stop": self.stop, "max_new_tokens": min(sampling.max_new_tokens, self.max_tokens - len(prompt))}
        )
        words = Words(self.tokenizer, on_text)
        write = self._by_engine if self.engine is not None else self._by_transformers
        try:
            write(prompt, sampling, words)
        except KeyboardInterrupt:
            pass
        self.answers += 1
        answer = words.end()
        self.forgotten += (len(self.turns) + 1 - len(turns)) // 2
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer

    def _fitting_prompt(self, turns: Turns, sampling: Sampling) -> tuple[Turns, list[int]]:
        """The newest turns, and their tokens: the oldest are left out until an answer of some length fits."""
        room = min(sampling.max_new_tokens, max(1, self.max_tokens // 4))
        for first in range(0, len(turns), 2):
            prompt = self._tokens(turns[first:])
            if not prompt:
                fail("there is nothing to continue: the prompt has no tokens", fix="write something")
            if len(prompt) + room <= self.max_tokens:
                return turns[first:], prompt
        left = self.max_tokens - len(prompt)
        raise StageError(
            f"this turn has {len(prompt)} tokens; with an answer of {room} that exceeds {self.max_tokens}",
            fix=f"shorten it, or ask for less: --max-new-tokens {left}" if left > 0 else "shorten it",
        )

    def _tokens(self, turns: Turns) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer("\n".join(turn["content"] for turn in turns))["input_ids"]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise StageError(
                f"the model's chat template refuses this conversation: {error}",
                where="chat_template of the model's tokenizer",
                fix="correct the template; without one, the model continues the text",
            ) from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _by_engine(self, prompt: list[int], sampling: Sampling, words: Words) -> None:
        self.engine.generate([prompt], sampling, row_ids=[self.answers], on_step=lambda new: words.add(new[0]))

    def _by_transformers(self, prompt: list[int], sampling: Sampling, words: Words) -> None:
        sampling = sampling.model_copy(update={"seed": sampling.seed + self.answers})
        generate_by_transformers(self.model, [prompt], sampling, streamer=_Streamer(words))


class Words:
    """Tokens as text, given on as soon as they make whole characters."""

    def __init__(self, tokenizer: Any, on_text: OnText) -> None:
        self.tokenizer, self.on_text = tokenizer, on_text
        self.tokens: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        self.tokens.append(token)
        text = self._text()
        # A character of several tokens is a replacement mark until its last one has come.
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> str:
        """Everything, stripped; what was held back is shown."""
        text = self._text()
        self._show(text)
        return text.strip()

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text

    def _text(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)


class _Streamer:
    """What transformers' generate calls with the prompt first and then with each token."""

    def __init__(self, words: Words) -> None:
        self.words, self.prompt_seen = words, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.words.add(int(value.reshape(-1)[0]))
        self.prompt_seen = True

    def end(self) -> None:
        pass
