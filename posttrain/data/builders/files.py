"""Text of the user's own: .jsonl, .txt and .md files."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.data.chat import normal_messages, plain_text, unreadable_turn
from posttrain.data.documents import Document, too_few
from posttrain.data.pairs import UNFINISHED, UnusableAnswers, answered_text, answers_kind, normal_answers, prompt_text
from posttrain.data.problems import ANSWER, TEST_CODE, TESTS, is_lone_prompt, question_turns, reward_fields
from posttrain.data.tasks import TASK
from posttrain.errors import RecipeError

SUFFIXES = (".jsonl", ".txt", ".md")
PIECE_CHARACTERS = 4000
"""A lone text file is cut at blank lines into pieces of about this size."""
_ANSWERS = 'rows {"prompt": ..., "chosen": ..., "rejected": ...} or {"prompt": ..., "completion": ...}'
PIECES = "2"
"""Changed when a lone text file would be cut or held out otherwise; part of the key."""


def text_files(path: Path, where: str) -> list[Path]:
    """The text files that `path` names: itself, or all below it (hidden ones left out), sorted.

    Raises:
        RecipeError: nothing there, or nothing that we read.
    """
    if not path.exists():
        raise RecipeError(f"no such file or folder: {path}", where=where, fix="give an existing file or folder")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            fix = f"use one of {', '.join(SUFFIXES)}; .jsonl has one JSON object a line"
            raise RecipeError(f"{path.name}: {path.suffix or 'no suffix'} is not read", where=where, fix=fix)
        return [path]
    below = (file for suffix in SUFFIXES for file in path.rglob(f"*{suffix}"))
    found = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not found:
        raise RecipeError(f"{path} holds no {', '.join(SUFFIXES)} file", where=where, fix="give a folder of text files")
    return sorted(found)


def read_files(path: Path, text_field: str, document_field: str | None, where: str) -> list[Document]:
    """All documents below `path`; empty ones are left out.

    Raises:
        RecipeError: a line that is not a row (with file:line), a file that is not UTF-8, or no text at all.
    """
    files = text_files(path, where)
    root = path if path.is_dir() else path.parent
    documents: list[Document] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.suffix.lower() == ".jsonl":
            documents += read_jsonl(file, name, text_field, document_field)
        elif text := _read_text(file).strip():
            documents.append(Document(id=name, text=text))
    if not documents:
        raise too_few(0, f"{where} ({path})")
    return documents


def named_fields(path: Path) -> list[str]:
    """The fields for rewards that rows below `path` may have: those whose name stands in a .jsonl file as a string."""
    found = set()
    for file in text_files(path, str(path)):
        if file.suffix.lower() != ".jsonl" or not file.stat().st_size:
            continue
        with file.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {name for name in (ANSWER, TESTS, TEST_CODE) if content.find(f'"{name}"'.encode()) >= 0}
    return sorted(found)


def is_lone_text(path: Path) -> bool:
    """True for a single .txt or .md file, which is one document and must be cut to be split."""
    return path.is_file() and path.suffix.lower() in (".txt", ".md")


def cut_text(document: Document, characters: int = PIECE_CHARACTERS) -> list[Document]:
    """Pieces of a long text of about that many characters, cut at blank lines, in order."""
    pieces: list[str] = [""]
    for paragraph in document.text.split("\n\n"):
        if pieces[-1] and len(pieces[-1]) + len(paragraph) > characters:
            pieces.append("")
        pieces[-1] += ("\n\n" if pieces[-1] else "") + paragraph
    return [Document(id=f"{document.id}#{number}", text=piece) for number, piece in enumerate(pieces) if piece.strip()]


def read_jsonl(file: Path, name: str, text_field: str, document_field: str | None) -> Iterator[Document]:
    """The documents of a .jsonl file, one a line; blank lines and empty texts are left out."""
    answered, lone = False, None
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file}:{number}"
            try:
                line = raw.decode("utf-8").strip()
                row = json.loads(line) if line else None
            except UnicodeDecodeError as error:
                raise RecipeError(f"not UTF-8 text: {error.reason}", where=where, fix="save it as UTF-8") from error
            except json.JSONDecodeError as error:
                fix = "every line must be one JSON object"
                raise RecipeError(f"not JSON: {error.msg} (column {error.colno})", where=where, fix=fix) from error
            if row is not None:
                document = row_document(row, f"{name}:{number}", text_field, document_field, where)
                answered |= document.kind in ("preference", "prompt")
                lone = lone or (where if is_lone_prompt(row, document_field) else None)
                if answered and lone:
                    what = "the row has no answer, and others of the file have (its fields: prompt)"
                    raise RecipeError(what, where=lone, fix=_ANSWERS)
                if document.kind != "text":
                    document = replace(document, fields={**document.fields, **reward_fields(row)})
                if document.text.strip():
                    yield document


def row_document(row: Any, row_id: str, text_field: str, document_field: str | None, where: str) -> Document:
    """A document of a row: `{text_field: str}`, `{"messages": [...]}` (also `conversations`), a preference pair
    (`prompt`, `chosen`, `rejected`), a `prompt` with its `completion`, a `question` (or `prompt`) with its `answer`
    or with the tests of a program, or a `prompt` alone.

    Raises:
        RecipeError: it is none of them, or lacks a part.
    """
    if not isinstance(row, dict):
        raise RecipeError("a row must be a JSON object", where=where, fix=f'{{"{text_field}": "..."}}')
    group = "" if document_field is None else f"{document_field}={row.get(document_field)}"
    row_id = str(row.get("id", row_id))
    text = row.get(text_field)
    if answers_kind(row) is not None:
        return _answers_document(row, row_id, text, group, where)
    messages = normal_messages(row.get("messages", row.get("conversations")))
    # A text of its own counts, unless it is the plain form of the conversation, as in our own artifacts.
    if isinstance(text, str) and (messages is None or text != plain_text(messages)):
        return Document(id=row_id, text=text, group=group)
    if messages is None and (asked := question_turns(row, document_field)):
        found = reward_fields(row)
        turns = tuple((turn["role"], turn["content"]) for turn in asked)
        if ANSWER in found:
            turns = (*turns, ("assistant", found[ANSWER]))
        text = plain_text([{"role": role, "content": content} for role, content in turns])
        return Document(id=row_id, text=text, group=group or plain_text(asked), messages=turns, fields=found)
    if messages is None and (why := unreadable_turn(row.get("messages", row.get("conversations")))):
        raise RecipeError(
            f"the turns of the row cannot be read: {why}",
            where=where,
            fix='every turn is {"role": "system", "user" or "assistant", "content": "a text"}; leave out rows with '
            "others, e.g. with calls of tools or with pictures",
        )
    if messages is None:
        fields = ", ".join(sorted(map(str, row))) or "none"
        raise RecipeError(
            f"the row has no text in field {text_field!r} and no `messages` (its fields: {fields})",
            where=where,
            fix='data.text_field=NAME, or rows {"messages": [{"role": "user", "content": "..."}, ...]}, or '
            '{"prompt": ..., "chosen": ..., "rejected": ...}, {"prompt": ..., "completion": ...}, or '
            '{"question": ..., "answer": ...} (or "tests": [...] for programs), or {"prompt": ...} alone',
        )
    turns = tuple((turn["role"], turn["content"]) for turn in messages)
    return Document(id=row_id, text=plain_text(messages), group=group, messages=turns, fields=_kept(row))


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """Fields of our own beside text, turns and answers: how to score the task, and which answers were cut off."""
    return {name: row[name] for name, kind in ((TASK, dict), (UNFINISHED, list)) if isinstance(row.get(name), kind)}


def _answers_document(row: dict[str, Any], row_id: str, text: Any, group: str, where: str) -> Document:
    """A preference pair or a prompt with its completion; all rows with one prompt stay in one split."""
    try:
        answers = normal_answers(row)
        plain = answered_text(answers)
    except UnusableAnswers as error:
        if isinstance(text, str):
            return Document(id=row_id, text=text, group=group)
        raise RecipeError(f"{error}", where=where, fix=_ANSWERS) from error
    if isinstance(text, str) and text != plain:
        return Document(id=row_id, text=text, group=group)
    group = group or f"prompt={prompt_text(answers)}"
    return Document(id=row_id, text=plain, group=group, fields={**answers, **_kept(row)})


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text: {error.reason}", where=str(file), fix="save it as UTF-8") from error
