"""Source models and token batches of the conversion's tests."""

from __future__ import annotations

import source_models
import torch

FAMILIES = source_models.FAMILIES


def make_source(family: str = "llama", **changes) -> torch.nn.Module:
    """`source_models.make_source`, with random weights in the norms of query and key heads (Qwen3)."""
    model = source_models.make_source(family, **changes)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.copy_(0.3 + 1.5 * torch.rand(parameter.shape, generator=generator))
    return model


def tokens(batch: int = 2, steps: int = 32, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, 256, (batch, steps), generator=torch.Generator().manual_seed(seed))


def text() -> list[torch.Tensor]:
    """Two calibration batches of 8 x 64 tokens."""
    return [tokens(8, 64, seed) for seed in (1, 2)]


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **fields) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, **fields).logits
