"""Greedy answers to a few prompts, so that a reader can see two models side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.generation import DecodeEngine, Sampling, unsupported

log = logging.getLogger(__name__)

TEMPLATE_DATE = "01 Jan 2025"
"""Given to chat templates that print today's date, which would change the answers from day to day."""


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

    The model's own generation settings (penalties, sampling) are put aside, its end-of-sequence tokens are kept.
    """
    if not prompts:
        return []
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    stop = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    rows = []
    for prompt in prompts:
        text, special = render_prompt(tokenizer, prompt)
        rows.append(tokenizer(text, add_special_tokens=special)["input_ids"])
    if reason := unsupported(model):
        log.warning("samples are written by transformers' generate: the fast decoder does not support %s", reason)
        answers = _by_transformers(model, tokenizer, rows, stop, max_new_tokens)
    else:
        engine = DecodeEngine(model, len(rows), max(map(len, rows)) + max_new_tokens, dtype=model.dtype, share=True)
        answers = engine.generate(rows, Sampling(max_new_tokens=max_new_tokens, stop=stop)).tokens
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


@torch.inference_mode()
def _by_transformers(
    model: Any, tokenizer: Any, rows: list[list[int]], stop: tuple[int, ...], max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers of a model that the decoder does not know, as one left-padded batch."""
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stop[0] if stop else 0
    device, width = model.get_input_embeddings().weight.device, max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop) or None, pad_token_id=pad
    )
    # Fields that `greedy` leaves open would be filled from the model's own settings, so those are taken off meanwhile.
    own, model.generation_config = model.generation_config, greedy
    try:
        return model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    finally:
        model.generation_config = own
