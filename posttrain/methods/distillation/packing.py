"""Whole documents packed into rows, with what keeps them apart: positions, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.data.packing import best_fit


class PackedRows(NamedTuple):
    """Rows of several documents; `N` rows of `T` tokens.

    Attributes:
        ids: token ids [N, T], int32; padding holds `pad`.
        positions: place of every token in its own document [N, T], int32. It starts anew at each document, and at the
            padding at a row's end, which transformers therefore sees as one more document that nothing else attends to.
        real: tokens of documents in every row [N], int64; the rest of a row is padding.
        pieces: documents, or parts of long ones, in every row [N], int64.
    """

    ids: Tensor
    positions: Tensor
    real: Tensor
    pieces: Tensor

    @property
    def waste(self) -> float:
        """Share of all tokens that is padding."""
        return 1 - int(self.real.sum()) / max(self.ids.numel(), 1)


def pack_documents(documents: Sequence[Sequence[int]], length: int, pad: int) -> PackedRows:
    """Best fit, longest first: every document goes to the fullest row that still holds it whole.

    Only a document longer than `length` is split, into parts of `length` and a rest; parts do not see each other.
    The result depends on the documents and their order alone.

    Raises:
        ValueError: `length` is below 1.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    pieces = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    rows = [[pieces[number] for number in row] for row in best_fit([len(piece) for piece in pieces], length)]
    return _tensors(rows, length, pad)


def _tensors(rows: list[list[Sequence[int]]], length: int, pad: int) -> PackedRows:
    ids = torch.full((len(rows), length), pad, dtype=torch.int32)
    positions = torch.zeros((len(rows), length), dtype=torch.int32)
    real = torch.zeros(len(rows), dtype=torch.long)
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            ids[row, at : at + len(piece)] = torch.tensor(piece, dtype=torch.int32)
            positions[row, at : at + len(piece)] = torch.arange(len(piece), dtype=torch.int32)
            at += len(piece)
        positions[row, at:] = torch.arange(length - at, dtype=torch.int32)
        real[row] = at
    return PackedRows(ids, positions, real, torch.tensor([len(pieces) for pieces in rows], dtype=torch.long))
