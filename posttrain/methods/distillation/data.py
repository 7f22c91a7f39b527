"""The sequences of a distillation run, in the order they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posttrain.data.reading import encode_documents, read_rows, token_blocks
from posttrain.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OrderedBlocks(Dataset[dict[str, Tensor]]):
    """`total` sequences drawn from `blocks` [N, T]: every epoch is a permutation, made of seed and epoch alone.

    Item i is the i-th sequence of the whole run, so that the order is the same for any micro-batch and after a resume.
    Tokens are held as int32, half the memory; `collate` gives the int64 that embeddings and losses want.
    """

    def __init__(self, blocks: Tensor, total: int, seed: int) -> None:
        self.blocks = blocks.to(torch.int32)
        self.total = total
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, place = divmod(index, len(self.blocks))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.blocks), generator=generator)
        return {"input_ids": self.blocks[self._order[place]]}


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`input_ids` [B, T], int64."""
    return {"input_ids": torch.stack([item["input_ids"] for item in items]).long()}


def read_blocks(folder: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Tensor:
    """Token blocks [N, T] of a dataset artifact, N >= 1.

    Raises:
        StageError: the dataset does not fill one sequence, or the tokenizer has no EOS.
    """
    try:
        documents = encode_documents(read_rows(folder), tokenizer)
    except ValueError as error:
        raise StageError(str(error), where=str(folder), fix="add an eos_token to tokenizer_config.json") from error
    blocks = token_blocks(documents, sequence_length)
    if len(blocks) == 0:
        tokens = sum(len(document) for document in documents)
        raise StageError(
            f"too little data: {len(documents)} documents give {tokens} tokens, one sequence takes {sequence_length}",
            where=str(folder),
            fix="give more text, or lower sequence_length",
        )
    return blocks
