"""Documents, the split into training and held-out, and the files of a dataset artifact."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.pairs import answers_kind
from posttrain.data.reading import CARD, ROWS
from posttrain.errors import RecipeError

BYTES_PER_TOKEN = 4
"""For estimates: English text under a vocabulary of tens of thousands of tokens."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        group: documents of one group never end up in different splits; by default a document's text is its own group.
        messages: turns, if the document is a conversation; `text` is then its plain rendering.
        fields: further fields of its row, JSON-able: `prompt`, `chosen`, `rejected` of a preference pair, and the like.
    """

    id: str
    text: str
    group: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def row(self) -> dict[str, Any]:
        """The line of `rows.jsonl`."""
        row: dict[str, Any] = {"id": self.id, "text": self.text}
        if self.messages:
            row["messages"] = [{"role": role, "content": content} for role, content in self.messages]
        return {**row, **self.fields}

    @property
    def kind(self) -> str:
        """What a stage finds in its row: `preference`, `prompt` (with a completion), `messages` or `text`."""
        return answers_kind(self.fields) or ("messages" if self.messages else "text")


def kinds(documents: Iterable[Document]) -> str:
    """The kinds of all documents, joined by `+`; most data have one."""
    return "+".join(sorted({document.kind for document in documents}))


def shared_fields(documents: Sequence[Document]) -> list[str]:
    """The fields that the rows of all documents have beside text and turns, sorted."""
    return sorted(set.intersection(*(set(document.fields) for document in documents)) if documents else set())


def split_documents(
    documents: Sequence[Document], fraction: float, where: str = ""
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, by a hash of each group: independent of order and of the other documents.

    With four groups or more each split has at least two, with fewer at least one: those nearest to the border change
    sides.

    Raises:
        RecipeError: fewer than two groups.
    """
    places = {_group(document): _place(_group(document)) for document in documents}
    if len(places) < 2:
        raise too_few(len(places), where)
    held = {group for group, place in places.items() if place < fraction}
    ordered = sorted(places, key=lambda group: (places[group], group))
    # Two are the least that intervals over documents can be drawn from; of two or three documents one must do.
    least = 2 if len(places) >= 4 else 1
    held = set(ordered[: min(max(len(held), least), len(places) - least)])
    train = [document for document in documents if _group(document) not in held]
    return train, [document for document in documents if _group(document) in held]


def too_few(found: int, where: str = "") -> RecipeError:
    """The error for data that cannot be split."""
    return RecipeError(
        f"{found} different document{'' if found == 1 else 's'} found; at least 2 are needed, one of them to hold out",
        where=where,
        fix="give more documents (a folder of files, or a .jsonl with one document a line), or held-out text of your "
        "own: data.heldout_path=FILE",
    )


def limited(documents: Iterable[Document], max_rows: int | None, max_bytes: int | None) -> list[Document]:
    """The first documents within the limits; the first one always stays."""
    kept: list[Document] = []
    size = 0
    for document in documents:
        size += len(document.text.encode())
        if kept and ((max_rows is not None and len(kept) >= max_rows) or (max_bytes is not None and size > max_bytes)):
            break
        kept.append(document)
    return kept


def write_dataset(folder: Path, documents: Sequence[Document], **card: Any) -> None:
    """Write `rows.jsonl` and `dataset.json`; `card` adds to rows, kind, fields, bytes and sha256."""
    digest, size = hashlib.sha256(), 0
    with (folder / ROWS).open("wb") as file:
        for document in documents:
            line = json.dumps(document.row, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            size += len(document.text.encode())
        file.flush()
        os.fsync(file.fileno())
    found = {"rows": len(documents), "kind": kinds(documents), "fields": shared_fields(documents)}
    content = {**card, **found, "bytes": size, "sha256": digest.hexdigest()}
    with (folder / CARD).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _group(document: Document) -> str:
    return document.group or document.text


def _place(group: str) -> float:
    """A number in [0, 1) that depends on the group alone."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
