"""From the rows of a dataset artifact to the sequences of a fine-tuning run."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from posttrain.data.packing import best_fit
from posttrain.data.reading import iter_rows
from posttrain.data.spans import IGNORE, UnusableRow, check_tokenizer, encode, spans
from posttrain.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.methods.sft.config import SftConfig

log = logging.getLogger(__name__)


@dataclass
class Sequences:
    """What a run trains on.

    Attributes:
        rows: `input_ids`, `labels` and `lengths` (of the documents in it) for each sequence.
        documents: rows of the artifact that are used; `truncated`: of these, without their end; `unusable`: reasons.
        learnt: tokens with a label, all sequences once.
    """

    rows: Dataset
    documents: int = 0
    truncated: int = 0
    learnt: int = 0
    unusable: Counter[str] = field(default_factory=Counter)


def read_sequences(folder: Path, tokenizer: PreTrainedTokenizerBase, cfg: SftConfig) -> Sequences:
    """Tokenise and, if wanted, pack a dataset artifact; say in the log what was cut or left out.

    Raises:
        StageError: no row can be used, or the tokenizer lacks what is needed; the reasons with their number.
    """
    check_tokenizer(tokenizer)
    found = Sequences(Dataset.from_list([]))
    documents = [piece for row in iter_rows(folder) for piece in _encode(row, tokenizer, cfg, found)]
    if not documents:
        raise _nothing(folder, found, cfg.sequence_length)
    for reason, count in found.unusable.most_common():
        log.warning("%d rows left out: %s", count, reason)
    if found.truncated:
        log.warning(
            "%d of %d rows are longer than sequence_length=%d and lose their end",
            found.truncated,
            found.documents,
            cfg.sequence_length,
        )
    found.rows = Dataset.from_list(_pack(documents, cfg.sequence_length) if cfg.packing else documents)
    found.learnt = sum(label != IGNORE for document in documents for label in document["labels"])
    return found


class Collator:
    """Rows as tensors [B, T], padded on the right: `input_ids`, `labels`, and positions or an attention mask.

    Packed: T is always `length`, and `position_ids` start anew at each document, by which transformers keeps documents
    apart where no attention mask is given; padding is a document of its own. Otherwise T is the longest row's, rounded
    up to a `multiple` within `length`.
    """

    def __init__(self, pad_token_id: int, length: int, packed: bool, multiple: int = 1) -> None:
        self.pad, self.length, self.packed, self.multiple = pad_token_id, length, packed, multiple

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = self.length if self.packed else min(self.length, -(-longest // self.multiple) * self.multiple)
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], width, self.pad),
            "labels": _padded([row["labels"] for row in rows], width, IGNORE),
        }
        if self.packed:
            batch["position_ids"] = torch.stack([_positions(row["lengths"], width) for row in rows])
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], width, 0)
        return batch


def _encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, cfg: SftConfig, found: Sequences
) -> list[dict[str, list[int]]]:
    """The row's documents, of at most `sequence_length` tokens and with something to learn; counts into `found`."""
    try:
        text = spans(row, cfg.loss_on, tokenizer)
    except UnusableRow as reason:
        found.unusable[str(reason)] += 1
        return []
    ids, labels = encode(text, tokenizer)
    starts = range(0, len(ids), cfg.sequence_length) if text.splits else [0]
    pieces = []
    for start in starts:
        part = slice(start, start + cfg.sequence_length)
        piece = {"input_ids": ids[part], "labels": [IGNORE, *labels[part][1:]]}
        if any(label != IGNORE for label in piece["labels"]):
            pieces.append({**piece, "lengths": [len(piece["input_ids"])]})
    cut = not text.splits and len(ids) > cfg.sequence_length
    if not pieces:
        found.unusable["nothing to learn is left within sequence_length" if cut else "nothing to learn in it"] += 1
        return []
    found.documents += 1
    found.truncated += cut
    return pieces


def _pack(documents: list[dict[str, list[int]]], length: int) -> list[dict[str, list[int]]]:
    packs = best_fit([len(document["input_ids"]) for document in documents], length)
    return [_joined([documents[number] for number in pack]) for pack in packs]


def _joined(documents: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    return {name: [value for document in documents for value in document[name]] for name in documents[0]}


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.long)


def _positions(lengths: list[int], width: int) -> Tensor:
    rest = width - sum(lengths)
    return torch.cat([torch.arange(length) for length in (*lengths, rest)])


def _nothing(folder: Path, found: Sequences, sequence_length: int) -> StageError:
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in found.unusable.most_common(3))
    commonest = found.unusable.most_common(1)
    fix = _remedy(commonest[0][0], sequence_length) if commonest else "give a dataset with rows"
    return StageError(f"nothing to train on: {reasons or 'the dataset has no rows'}", where=str(folder), fix=fix)


def _remedy(reason: str, sequence_length: int) -> str:
    """What makes rows usable that were left out for that reason."""
    if "sequence_length" in reason:
        return f"a larger sequence_length than {sequence_length}, or shorter rows"
    if "no chat template" in reason:
        return "add a chat_template to the model's tokenizer, or use rows of `text` with loss_on=all"
    if "chat template" in reason:
        return "conversations that the model's chat template takes, or mend the template (chat_template.jinja)"
    return "another dataset or loss_on (all: plain text; completion: prompts; assistant: conversations)"
