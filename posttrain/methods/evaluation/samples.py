"""Greedy answers to a few prompts, so that a reader can see two models side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from posttrain.data.chat import TEMPLATE_DATE
from posttrain.generation import DecodeEngine, Sampling, unsupported
from posttrain.generation.fallback import generate_by_transformers
from posttrain.generation.tokens import stop_tokens

log = logging.getLogger(__name__)


def render_prompt(tokenizer: Any, prompt: str) -> tuple[str, bool]:
    """The text the model continues, and whether special tokens are to be added to it when it is tokenised."""
    if not getattr(tokenizer, "chat_template", None):
        return prompt, True
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE
    )
    return text, False


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy continuation of every prompt, decoded without special tokens.

    The model's own generation settings (penalties, sampling) are put aside; an answer ends as in `posttrain chat`.
    """
    if not prompts:
        return []
    sampling = Sampling(max_new_tokens=max_new_tokens, stop=stop_tokens(model, tokenizer))
    rows = []
    for prompt in prompts:
        text, special = render_prompt(tokenizer, prompt)
        rows.append(tokenizer(text, add_special_tokens=special)["input_ids"])
    if reason := unsupported(model):
        log.warning("samples are written by transformers' generate: the fast decoder does not support %s", reason)
        answers = generate_by_transformers(model, rows, sampling, tokenizer.pad_token_id)
    else:
        engine = DecodeEngine(model, len(rows), max(map(len, rows)) + max_new_tokens, dtype=model.dtype, share=True)
        answers = engine.generate(rows, sampling).tokens
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
