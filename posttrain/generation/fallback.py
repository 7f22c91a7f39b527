"""transformers' `generate` for models that the decoder does not know."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from posttrain.generation.settings import Sampling
from posttrain.generation.tokens import check_ids


@torch.inference_mode()
def generate_by_transformers(
    model: Any, rows: list[list[int]], sampling: Sampling, pad: int | None = None, streamer: Any = None
) -> list[list[int]]:
    """Answers to all prompts as one left-padded batch; a row that ended is filled up with `pad`.

    The model's own generation settings (penalties, sampling) are put aside: only `sampling` counts. Draws come from
    torch's global generator, seeded with `sampling.seed`.

    Args:
        pad: token that fills rows up; null is the first stop token.
        streamer: for a single row, gets the prompt and then each token, as `generate` calls it.

    Raises:
        StageError: a prompt is empty, or holds an id that the model does not have.
    """
    embeddings = model.get_input_embeddings().weight
    check_ids(rows, embeddings.shape[0])
    if pad is None:
        pad = sampling.stop[0] if sampling.stop else 0
    device, width = embeddings.device, max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    if not sampling.greedy:
        torch.manual_seed(sampling.seed)
    # Fields that ours leave open would be filled from the model's own settings, so those are taken off meanwhile.
    own, model.generation_config = model.generation_config, _settings(sampling, pad)
    try:
        return model.generate(input_ids=ids, attention_mask=mask, streamer=streamer)[:, width:].tolist()
    finally:
        model.generation_config = own


def _settings(sampling: Sampling, pad: int) -> GenerationConfig:
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    if sampling.min_p:
        drawn["min_p"] = sampling.min_p
    return GenerationConfig(
        do_sample=not sampling.greedy,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop) or None,
        pad_token_id=pad,
        **({} if sampling.greedy else drawn),
    )
