"""One pass over the documents with the model and the baseline, one document at a time, resumable between any two."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import fail
from posttrain.methods.evaluation.metrics import LogitsOf, Sums, score_window

LARGEST_NLL = 700.0
"""Nats per token whose exponential is still a number: beyond it a model is broken, not bad."""


class Logits:
    """Logits of a window, made a few rows at a time where the model allows it.

    The trunk runs once; the output head then runs on the rows that are asked for, so `[T, V]` never exists. A model
    whose logits are more than head(trunk) (soft-capped, scaled) is found by a probe and gives all its logits at once.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.head = model.get_output_embeddings()
        self.trunk = getattr(model, "base_model", None)
        self.chunked = self._head_of_trunk_is_logits()

    @torch.inference_mode()
    def _head_of_trunk_is_logits(self) -> bool:
        if self.head is None or self.trunk is None or self.trunk is self.model:
            return False
        ids = torch.arange(4, device=self.device)[None]
        logits = self.model(input_ids=ids, use_cache=False).logits
        split = self.head(self.trunk(input_ids=ids, use_cache=False)[0])
        return split.shape == logits.shape and torch.allclose(split, logits, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def window(self, ids: torch.Tensor) -> LogitsOf:
        """Run the trunk on `ids` `[T]`; the result gives logits `[n, V]` for a slice of positions."""
        if not self.chunked:
            logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
            return lambda rows: logits[rows]
        hidden = self.trunk(input_ids=ids[None], use_cache=False)[0][0]  # [T, D]
        return torch.no_grad()(lambda rows: self.head(hidden[rows]))


@dataclass(frozen=True)
class Document:
    """A tokenised document cut into windows, and the UTF-8 bytes of the text that its scored tokens stand for."""

    id: str
    windows: tuple[tuple[int, ...], ...]
    text_bytes: int

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def make_documents(
    rows: Sequence[dict[str, Any]], encoded: Sequence[Sequence[int]], tokenizer: Any, max_tokens: int, max_windows: int
) -> list[Document]:
    """Cut documents into windows of at most `max_tokens`; a window of one token scores nothing and is dropped."""
    documents = []
    for row, ids in zip(rows, encoded, strict=True):
        kept = tuple(ids[: max_tokens * max_windows])
        windows = tuple(kept[start : start + max_tokens] for start in range(0, len(kept), max_tokens))
        windows = tuple(window for window in windows if len(window) > 1)
        if windows:
            documents.append(Document(str(row["id"]), windows, _scored_bytes(windows, tokenizer)))
    return documents


def _scored_bytes(windows: Sequence[Sequence[int]], tokenizer: Any) -> int:
    """Bytes of the windows' text without what their first tokens (context only) stand for."""

    def size(ids: Sequence[int]) -> int:
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(text.encode("utf-8"))

    return sum(size(window) - size(window[:1]) for window in windows)


def score_document(document: Document, model: Logits, baseline: Logits | None, chunk_tokens: int) -> Sums:
    """Sums over all windows of one document. Raises StageError when a model's output is not a number."""
    total: Sums | None = None
    for window in document.windows:
        ids = torch.tensor(window, device=model.device)
        part = score_window(
            ids[1:], model.window(ids[:-1]), None if baseline is None else baseline.window(ids[:-1]), chunk_tokens
        )
        total = part if total is None else total + part
    assert total is not None  # a Document has at least one window
    values = [value for value in total.to_json().values() if value is not None]
    if not all(math.isfinite(value) for value in values) or max(values) > LARGEST_NLL * total.tokens:
        fail(
            f"document {document.id!r}: the model's output is not a finite number, or its perplexity overflows",
            where="evaluate",
            fix="look at the stage that made the model (its loss curve); on bf16 try precision=fp32",
        )
    return total


class PartialResults:
    """Finished documents of an interrupted evaluation: one JSON line each, written before the next one starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[int, Sums] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        kept = 0
        with self.path.open("rb") as file:
            for line in file:
                # A kill in mid-write leaves a last line without its end: that document is scored again.
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                index = record.pop("index")
                self.sums[index] = Sums(**record)
                kept += len(line)
        os.truncate(self.path, kept)

    def add(self, index: int, sums: Sums) -> None:
        self.sums[index] = sums
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"index": index, **sums.to_json()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
