"""Completions of the policy as it is now, written by `DecodeEngine`: TRL's generation step with our decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from posttrain.generation import DecodeEngine, Sampling

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}

PROMPT_BUCKET = 32
"""The cache is made for prompts rounded up to this, so that a slightly longer batch seldom needs a new one."""


@dataclass(frozen=True)
class Written:
    """Token ids of the completions, and the log-probability at which each token was drawn."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


class EngineRollout:
    """Keeps one engine for a whole run: every call takes over the policy's weights and writes completions.

    Args:
        model: the policy; read at every call.
        rows: completions side by side.
        longest_prompt: tokens; caches are made for it.
    """

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, rows: int, longest_prompt: int, dtype: str = "auto"
    ) -> None:
        self.model, self.sampling, self.rows, self.dtype = model, sampling, rows, DTYPES[dtype]
        self.max_tokens = -(-longest_prompt // PROMPT_BUCKET) * PROMPT_BUCKET + sampling.max_new_tokens
        self._engine: DecodeEngine | None = None

    def __call__(
        self,
        prompts: list[list[int]],
        first_row: int,
        seed: int,
        at_wave: Callable[[], None] = lambda: None,
        weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Written:
        """Continue every prompt.

        Args:
            first_row: number of the first prompt among those of all ranks: with `seed` it decides the draws, so that
                they do not depend on how prompts are shared out.
            at_wave: called before every `rows` prompts; may end the stage.
            weights: within it the policy's weights can be read; left before anything is written.
        """
        with weights():
            engine = self._engine_with_weights()
        sampling = self.sampling.model_copy(update={"seed": seed})
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        for start in range(0, len(prompts), self.rows):
            at_wave()
            part = prompts[start : start + self.rows]
            row_ids = range(first_row + start, first_row + start + len(part))
            found = engine.generate(part, sampling, row_ids=list(row_ids))
            tokens += found.tokens
            logprobs += found.logprobs
        return Written(tokens, logprobs)

    def _engine_with_weights(self) -> DecodeEngine:
        if self._engine is None:
            self._engine = DecodeEngine(self.model, self.rows, self.max_tokens, dtype=self.dtype)
        else:
            self._engine.load(self.model)
        return self._engine
