"""Rows of prompt and completion without the padding between: what a forward pass needs, and the way back.

TRL pads prompts on the left and completions on the right to the longest of the whole roll-out batch. Moved to the left
edge, a row has padding behind it only, which a causal model never looks at: no mask, and the width of the longest row
that is computed together.

Legend: B rows, P padded prompt, C padded completion, W width of the moved rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Rows at the left edge.

    Attributes:
        input_ids: `[B, W]`; behind a row stand tokens of no meaning.
        scored: `[B, W - 1]`, where position t predicts a completion's token at t + 1.
        places: `[B, C]`, for each token of the completions the position that predicts it; 0 where `mask` is not.
        mask: `[B, C]`, tokens of the completions that are there.
    """

    input_ids: Tensor
    scored: Tensor
    places: Tensor
    mask: Tensor


def align(input_ids: Tensor, attention_mask: Tensor, completion: int, multiple: int = 1) -> Aligned:
    """Move rows to the left edge.

    Args:
        input_ids, attention_mask: `[B, P + C]`, a row's ones without a gap.
        completion: C, columns of the completions.
        multiple: W is a multiple of it, or P + C if that is less.
    """
    columns = input_ids.shape[1]
    real = attention_mask.bool()
    start = real.int().argmax(1, keepdim=True)  # of the first one; 0 in a row without any
    lengths = real.sum(1, keepdim=True)
    prompts = real[:, :-completion].sum(1, keepdim=True)
    width = min(columns, -(-max(2, int(lengths.max())) // multiple) * multiple)
    at = torch.arange(width, device=input_ids.device)
    moved = input_ids.gather(1, (start + at).clamp(max=columns - 1))
    scored = (at[1:] >= prompts) & (at[1:] < lengths)
    token = torch.arange(completion, device=input_ids.device)
    mask = token < lengths - prompts
    places = (prompts + token - 1).masked_fill(~mask, 0)
    return Aligned(moved, scored, places, mask)


def back(values: Tensor, rows: Aligned) -> Tensor:
    """Values `[N]` of the scored positions, row by row, as `[B, C]` with zeros where no token is."""
    full = values.new_zeros(rows.scored.shape).masked_scatter(rows.scored, values)
    return full.gather(1, rows.places).masked_fill(~rows.mask, 0.0)
