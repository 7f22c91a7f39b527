"""The sequences of a distillation run, in the order they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from posttrain.errors import StageError
from posttrain.methods.distillation.loss import IGNORE
from posttrain.methods.distillation.packing import PackedRows, pack_documents
from posttrain.training.blocks import OrderedBlocks, read_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.methods.distillation.config import DistillConfig
    from posttrain.methods.distillation.teacher_cache import TopKCache

Collate = Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]


class OrderedPacks(OrderedBlocks):
    """As `OrderedBlocks`, for rows of packed documents; every item also knows the totals of its optimiser step.

    An item has `input_ids` and `position_ids` [T], `mask` [T] (false: padding), `labels` [T] (the next token of the
    same document, else -100), and `step_tokens`, `step_labels`: unmasked and labelled tokens of the whole
    optimiser step.
    A loss divided by these depends neither on the micro-batch nor on where a run was interrupted.
    """

    def __init__(self, rows: PackedRows, total: int, seed: int, rows_per_step: int) -> None:
        super().__init__(rows.ids, total, seed)
        self.rows, self.rows_per_step = rows, rows_per_step
        self._step, self._totals = -1, (0, 0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step_tokens, step_labels = self.totals(index // self.rows_per_step)
        row = self.place(index)
        ids, positions = self.rows.ids[row], self.rows.positions[row]
        mask = torch.arange(len(ids)) < self.rows.real[row]
        labels = ids.roll(-1).long()
        # The next token is of the same document where the next position goes on; padding starts at position 0.
        labels[~(mask & (positions.roll(-1) == positions + 1))] = IGNORE
        return {
            "input_ids": ids,
            "position_ids": positions,
            "mask": mask,
            "labels": labels,
            "step_tokens": torch.tensor(step_tokens),
            "step_labels": torch.tensor(step_labels),
        }

    def totals(self, step: int) -> tuple[int, int]:
        """Unmasked and labelled tokens of that optimiser step, counted from 0."""
        if step != self._step:
            first = step * self.rows_per_step
            places = self.order[first : first + self.rows_per_step]
            tokens = int(self.rows.real[places].sum())
            # Every piece has one token without a label: its last.
            self._step, self._totals = step, (tokens, tokens - int(self.rows.pieces[places].sum()))
        return self._totals


class WithTeacher(Dataset[dict[str, Tensor]]):
    """The items of `sequences`, each with what was kept of the teacher: `teacher_ids` and `teacher_logprobs`."""

    def __init__(self, sequences: OrderedBlocks, cache: TopKCache) -> None:
        self.sequences, self.cache = sequences, cache

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        kept = self.cache[self.sequences.place(index)]
        return {**self.sequences[index], **{f"teacher_{name}": tensor for name, tensor in kept._asdict().items()}}


def run_sequences(blocks: Tensor | PackedRows, config: DistillConfig, seed: int) -> OrderedBlocks:
    """All sequences of a run in the order they are used."""
    total = config.max_steps * config.sequences_per_step
    if isinstance(blocks, PackedRows):
        return OrderedPacks(blocks, total, seed, config.sequences_per_step)
    return OrderedBlocks(blocks, total, seed)


def collate_with_teacher(collate: Collate) -> Collate:
    """The same for items of `WithTeacher`: [B, T, k] and [B, T, k + 1] beside the rest."""

    def both(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        kept = {name: torch.stack([item[name] for item in items]) for name in ("teacher_ids", "teacher_logprobs")}
        return {**collate(items), **kept}

    return both


def collate_packs(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The items' tensors stacked [B, T], int64 where they are ids; the totals of the step stay scalars."""
    batch = {
        name: torch.stack([item[name] for item in items]) for name in ("input_ids", "position_ids", "mask", "labels")
    }
    batch |= {name: batch[name].long() for name in ("input_ids", "position_ids")}
    return batch | {name: items[0][name] for name in ("step_tokens", "step_labels")}


def read_packs(folder: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> PackedRows:
    """The documents of a dataset artifact packed into rows of `sequence_length`; at least one row.

    Raises:
        StageError: there is no document, or the tokenizer has no EOS.
    """
    documents = read_documents(folder, tokenizer)
    if not documents:
        raise StageError("the training data has no documents", where=str(folder), fix="give more text")
    return pack_documents(documents, sequence_length, tokenizer.eos_token_id)
