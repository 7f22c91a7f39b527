"""Read a dataset artifact and turn its documents into token blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import render
from posttrain.errors import StageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ROWS, CARD = "rows.jsonl", "dataset.json"


def iter_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a dataset artifact, one after the other, whatever their fields.

    Raises:
        StageError: there is no `rows.jsonl`, or a line of it is not a JSON object.
    """
    path = Path(folder) / ROWS
    if not path.is_file():
        raise StageError(f"no {ROWS} in the dataset folder", where=str(folder), fix="posttrain verify RUN")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise StageError(f"not JSON: {error.msg}", where=f"{path}:{number}") from error
            if not isinstance(row, dict):
                raise StageError("a row must be a JSON object", where=f"{path}:{number}")
            yield row


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a dataset artifact as documents, `{"id": str, "text": str}` and further fields.

    Raises:
        StageError: as `iter_rows`, or a row has no text.
    """
    rows = []
    for number, row in enumerate(iter_rows(folder), start=1):
        if not isinstance(row.get("text"), str):
            raise StageError('a row must be {"id": ..., "text": ...}', where=f"{Path(folder) / ROWS}:{number}")
        rows.append(row)
    return rows


def read_card(folder: Path) -> dict[str, Any]:
    """The `dataset.json` of a dataset artifact: name, split, rows, bytes, sha256, licence, builder, …"""
    return json.loads((Path(folder) / CARD).read_text(encoding="utf-8"))


def encode_documents(
    rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> list[list[int]]:
    """Token ids of every document, in order: BOS only if the tokenizer itself adds it, EOS at the end.

    A row with `messages` is rendered by the tokenizer's chat template, so that a model meets its own format; without a
    template its role-tagged `text` counts.

    Args:
        max_tokens: a longer document is cut to this many tokens; a cut document has no EOS.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token: documents cannot be told apart")
    documents = []
    for row in rows:
        chat = render(row["messages"], tokenizer) if row.get("messages") else None
        ids = tokenizer(
            row["text"] if chat is None else chat,
            add_special_tokens=chat is None,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        documents.append(ids if max_tokens is None else ids[:max_tokens])
    return documents


def token_blocks(documents: Iterable[list[int]], sequence_length: int) -> torch.LongTensor:
    """All documents one after the other, cut into rows of `sequence_length`; the tail that fills no row is dropped.

    Returns:
        Token ids [N, T]; N is 0 when there is less than one row.
    """
    import torch

    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}")
    flat = [token for document in documents for token in document]
    blocks = len(flat) // sequence_length
    return torch.tensor(flat[: blocks * sequence_length], dtype=torch.long).view(blocks, sequence_length)
