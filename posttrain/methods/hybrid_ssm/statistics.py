"""How far back each attention head looks on average: what the aligned init sets its decays by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

MEASURING = "posttrain_distances"


@dataclass(frozen=True)
class HeadStatistics:
    """Per layer `distance` [H]: E[Σ_s p_ts (t − s)] of every head, tokens, fp64; None for a layer without attention."""

    distance: tuple[Tensor | None, ...]
    tokens: int


def collect_head_statistics(
    model: nn.Module, batches: Iterable[Tensor], on_batch: Callable[[int], None] | None = None
) -> HeadStatistics:
    """Run token batches through a model and average every head's attention distance.

    Args:
        model: a Llama-shaped causal LM; left as it was.
        batches: token ids [B, T], without padding. Where a row joins documents, what looks across their border counts.
        on_batch: called with the number of batches done; it may raise to stop.

    Raises:
        ValueError: no tokens, or attention that is not finite.
    """
    device, sums = next(model.parameters()).device, {}
    before, training, tokens = model.config._attn_implementation, model.training, 0
    AttentionInterface.register(MEASURING, _measuring(sums))
    model.eval()
    try:
        # No mask function goes with this name, so no mask is made: causality is the function's own.
        model.config._attn_implementation = MEASURING
        with torch.no_grad():
            for done, batch in enumerate(batches, start=1):
                model.model(input_ids=batch.to(device), use_cache=False)
                tokens += batch.numel()
                if on_batch is not None:
                    on_batch(done)
    finally:
        model.config._attn_implementation = before
        model.train(training)
        del AttentionInterface._global_mapping[MEASURING]
    if tokens == 0:
        raise ValueError("head statistics need at least one sequence of tokens")
    means = [sums[layer] / tokens if layer in sums else None for layer in range(model.config.num_hidden_layers)]
    if not all(mean is None or bool(torch.isfinite(mean).all()) for mean in means):
        raise ValueError("head statistics met attention that is not finite: the source model or its dtype is broken")
    return HeadStatistics(tuple(means), tokens)


def _measuring(sums: dict[int, Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Causal attention that adds each head's distances, over rows and tokens, to `sums[layer]`."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        position = torch.arange(length, device=query.device)
        back = position[:, None] - position
        scores = (query.float() @ key.float().mT * scaling).masked_fill(back < 0, -torch.inf)
        weights = scores.softmax(dim=-1)
        found = (weights * back).sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
        sums[module.layer_idx] = sums.get(module.layer_idx, 0) + found
        return (weights.to(value.dtype) @ value).transpose(1, 2), None

    return attention
