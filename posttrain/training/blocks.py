"""Blocks of tokens from a dataset artifact, in the order in which a training run uses them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posttrain.data.reading import encode_documents, read_rows, token_blocks
from posttrain.errors import StageError
from posttrain.training.order import run_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SEQUENCES_PER_DOCUMENT = 4
"""A long document gives at most this many sequences of a sample, so that more documents are seen, if there are more."""


class OrderedBlocks(Dataset[dict[str, Tensor]]):
    """`total` sequences drawn from `blocks` [N, T] in the order of `run_order`, epoch after epoch.

    Item i is the i-th sequence of the whole run, so that the order is the same for any micro-batch and after a resume.
    Tokens are held as int32, half the memory; `collate` gives the int64 that embeddings and losses want.
    """

    def __init__(self, blocks: Tensor, total: int, seed: int) -> None:
        self.blocks = blocks.to(torch.int32)
        self.order = run_order(len(blocks), total, seed)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[self.place(index)]}

    def place(self, index: int) -> int:
        """Which of the blocks is the run's sequence `index`."""
        return int(self.order[index])


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`input_ids` [B, T], int64."""
    return {"input_ids": torch.stack([item["input_ids"] for item in items]).long()}


def read_blocks(folder: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Tensor:
    """Token blocks [N, T] of a dataset artifact, N >= 1.

    Raises:
        StageError: the dataset does not fill one sequence, or the tokenizer has no EOS.
    """
    documents = read_documents(folder, tokenizer)
    blocks = token_blocks(documents, sequence_length)
    if len(blocks) == 0:
        tokens = sum(len(document) for document in documents)
        raise StageError(
            f"too little data: {len(documents)} documents give {tokens} tokens, one sequence takes {sequence_length}",
            where=str(folder),
            fix="give more text, or lower sequence_length",
        )
    return blocks


def sample_blocks(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    sequence_length: int,
    seed: int,
    *,
    purpose: str,
    where: str,
    setting: str,
) -> Tensor:
    """At most `tokens` tokens of a dataset artifact as blocks [N, T], N >= 1, from documents in an order drawn by seed.

    For statistics and measurements that need some text, not all of it.

    Args:
        purpose, where, setting: what the text is for, the input it comes by, and the setting of `sequence_length`, for
            the error message.

    Raises:
        StageError: the text does not fill one block.
    """
    rows = read_rows(folder)
    random.Random(seed).shuffle(rows)
    for limit in (SEQUENCES_PER_DOCUMENT * sequence_length, tokens + sequence_length):
        documents: list[list[int]] = []
        found = 0
        for row in rows:
            # 16 characters a token are more than any tokenizer needs; tokenizing whole books would take minutes.
            documents += encode_documents([{**row, "text": row["text"][: 16 * limit]}], tokenizer, max_tokens=limit)
            found += len(documents[-1])
            if found >= tokens + sequence_length:
                break
        if found >= tokens:
            break  # else a few long documents are all there is
    blocks = token_blocks(documents, sequence_length)[: max(1, tokens // sequence_length)]
    if not len(blocks):
        what = f"{purpose} needs at least {sequence_length} tokens, the data have {found}"
        raise StageError(what, where=where, fix=f"give more text, or {setting}={max(2, found)}")
    return blocks


def read_documents(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every document of a dataset artifact. Raises StageError: the tokenizer has no EOS."""
    try:
        return encode_documents(read_rows(folder), tokenizer)
    except ValueError as error:
        raise StageError(str(error), where=str(folder), fix="add an eos_token to tokenizer_config.json") from error
