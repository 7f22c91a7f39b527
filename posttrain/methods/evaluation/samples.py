"""Greedy answers to a few prompts, so that a reader can see two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy continuation of every prompt, decoded without special tokens; one left-padded batch.

    The model's own generation settings (penalties, sampling) are put aside, its end-of-sequence tokens are kept.
    """
    from transformers import GenerationConfig

    if not prompts:
        return []
    device = model.get_input_embeddings().weight.device
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos if eos is not None else 0
    rows = []
    for prompt in prompts:
        text, special = render_prompt(tokenizer, prompt)
        rows.append(tokenizer(text, add_special_tokens=special)["input_ids"])
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad)
    # Fields that `greedy` leaves open would be filled from the model's own settings, so those are taken off meanwhile.
    own, model.generation_config = model.generation_config, greedy
    try:
        output = model.generate(input_ids=ids, attention_mask=mask)
    finally:
        model.generation_config = own
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in output]
