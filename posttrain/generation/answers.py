"""A text for a text: tokens of a conversation, a model that writes, and its words as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from posttrain.errors import fail
from posttrain.generation.engine import DecodeEngine
from posttrain.generation.sampling import Sampling
from posttrain.generation.weights import unsupported

log = logging.getLogger(__name__)

MOST_TOKENS = 4096
"""Cache slots of a conversation where the model allows more: memory is taken at the start, not as the text grows."""

OnText = Callable[[str], None]


class Conversation:
    """Turns with one model, through its chat template; without one, a text that is continued.

    Attributes:
        forgotten: turns that were dropped from the beginning because the conversation outgrew the cache.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = MOST_TOKENS) -> None:
        limit = getattr(model.config, "max_position_embeddings", None) or max_tokens
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, min(max_tokens, limit)
        self.stop = stop_tokens(model, tokenizer)
        self.engine: DecodeEngine | None = None
        if reason := unsupported(model):
            log.warning("answers are written by transformers' generate: the fast decoder does not support %s", reason)
        else:
            self.engine = DecodeEngine(model, 1, self.max_tokens, dtype=model.dtype, share=True)
        self.turns: list[dict[str, str]] = []
        self.answers = self.forgotten = 0

    def reset(self) -> None:
        """Forget everything said."""
        self.turns = []

    def ask(self, text: str, sampling: Sampling, on_text: OnText = lambda piece: None) -> str:
        """The answer to the next turn; `on_text` gets it piece by piece.

        The number of the answer is part of the seed: a question asked twice is answered by other draws. A
        KeyboardInterrupt ends the answer, which stays as far as it came.

        Raises:
            StageError: the turn alone is too long for the cache.
        """
        self.turns.append({"role": "user", "content": text})
        prompt = self._fitting_prompt(sampling)
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
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _fitting_prompt(self, sampling: Sampling) -> list[int]:
        """The conversation as tokens, its oldest turns dropped until an answer of some length fits."""
        room = min(sampling.max_new_tokens, max(1, self.max_tokens // 4))
        while True:
            prompt = self._tokens()
            if not prompt:
                fail("there is nothing to continue: the prompt has no tokens", fix="write something")
            if len(prompt) + room <= self.max_tokens:
                return prompt
            if len(self.turns) == 1:
                self.turns = []
                fail(
                    f"this turn has {len(prompt)} tokens; with an answer of {room} that exceeds {self.max_tokens}",
                    fix="shorten it, or lower --max-new-tokens",
                )
            self.turns, self.forgotten = self.turns[2:], self.forgotten + 1

    def _tokens(self) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(self.turns, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer("\n".join(turn["content"] for turn in self.turns))["input_ids"]

    def _by_engine(self, prompt: list[int], sampling: Sampling, words: Words) -> None:
        self.engine.generate([prompt], sampling, row_ids=[self.answers], on_step=lambda new: words.add(new[0]))

    @torch.inference_mode()
    def _by_transformers(self, prompt: list[int], sampling: Sampling, words: Words) -> None:
        from transformers import GenerationConfig

        drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        config = GenerationConfig(
            do_sample=not sampling.greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=list(sampling.stop) or None,
            pad_token_id=sampling.stop[0] if sampling.stop else 0,
            **({} if sampling.greedy else drawn),
        )
        torch.manual_seed(sampling.seed + self.answers)
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=_Streamer(words)
        )


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


def stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: those of the generation settings and the tokenizer's EOS."""
    eos = model.generation_config.eos_token_id
    own = [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]
    found = dict.fromkeys([*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    return tuple(token for token in found if token < model.config.vocab_size)
