"""The first rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from posttrain.data.builders.files import row_document
from posttrain.data.chat import normal_messages, plain_text
from posttrain.data.config import DataSourceConfig
from posttrain.data.documents import Document
from posttrain.data.pairs import Turns
from posttrain.data.problems import ANSWER, found_answer, value_at, with_instruction
from posttrain.data.sections import HubData
from posttrain.errors import PosttrainError, StageError
from posttrain.pipeline.context import StageContext


def build(cfg: DataSourceConfig, ctx: StageContext) -> list[Document]:
    """Stream `hub.max_rows` rows; nothing is kept of an interrupted download, since a stream is cheap to start anew.

    With `hub.answer_field`, rows without a right answer are left out, and with `hub.question_field` all but the first
    that ask the same. Both are counted in the result.

    Raises:
        StageError: the hub cannot be reached, a row has no text, or no row has a right answer.
    """
    assert cfg.hub is not None
    documents: dict[str, Document] = {}
    unanswered = duplicates = 0
    try:
        for number, row in enumerate(_stream(cfg)):
            if number >= cfg.hub.max_rows:
                break
            where = f"{cfg.hub.name} [{cfg.hub.split}] row {number}"
            document = _document(row, number, cfg, where)
            same = document.group if document is not None and cfg.hub.question_field else str(number)
            if document is None:
                unanswered += 1
            elif same in documents:
                duplicates += 1
            elif document.text.strip():
                documents[same] = document
            ctx.progress(number + 1, cfg.hub.max_rows, unit="row")
            if ctx.should_stop():
                ctx.stop(number + 1)
    except PosttrainError as error:
        raise StageError(problems=error.problems) from error
    if cfg.hub.answer_field is not None:
        ctx.record_result(unanswered=unanswered, duplicates=duplicates)
        if not documents and unanswered:
            raise _no_answers(cfg.hub, unanswered)
    return list(documents.values())


def _document(row: dict[str, Any], number: int, cfg: DataSourceConfig, where: str) -> Document | None:
    """The document of a row; None if it should have a right answer and has none."""
    hub = cfg.hub
    assert hub is not None
    if hub.answer_field is None:
        return row_document(row, str(number), cfg.text_field, cfg.document_field, where)
    found = found_answer(_text(value_at(row, hub.answer_field)), hub.answer_pattern)
    if found is None:
        return None
    if hub.question_field is None:
        document = row_document(row, str(number), cfg.text_field, cfg.document_field, where)
        return replace(document, fields={**document.fields, ANSWER: found[0]})
    turns = [*_question(row, hub, where), {"role": "assistant", "content": _solution(row, hub, found[0])}]
    messages = tuple((turn["role"], turn["content"]) for turn in turns)
    group = plain_text(turns[:-1])
    row_id = str(row.get("id", number))
    return Document(id=row_id, text=plain_text(turns), group=group, messages=messages, fields={ANSWER: found[0]})


def _question(row: dict[str, Any], hub: HubData, where: str) -> Turns:
    """The turns that ask; the instruction is behind the last of them."""
    asked = value_at(row, str(hub.question_field))
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else normal_messages(asked)
    if not turns:
        fields = ", ".join(sorted(map(str, row))) or "none"
        what = f"the row has no question in {hub.question_field!r} (its fields: {fields})"
        raise StageError(what, where=where, fix="data.hub.question_field=NAME, of a text or of turns")
    last = turns[-1]
    return [*turns[:-1], {**last, "content": with_instruction(last["content"].strip(), hub.instruction)}]


def _solution(row: dict[str, Any], hub: HubData, answer: str) -> str:
    """The assistant's turn: the worked solution, if there is one, ending with the answer in the form asked for."""
    last_line = hub.answer_text.replace("{answer}", answer)
    solution = "" if hub.solution_field is None else _text(value_at(row, hub.solution_field)).strip()
    if last_line in solution:
        return solution
    found = found_answer(solution, hub.answer_pattern) if hub.answer_pattern else None
    body = (solution if found is None else found[1]).rstrip()
    return f"{body}\n{last_line}" if body else last_line


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, bool) else str(value)


def _no_answers(hub: HubData, count: int) -> StageError:
    pattern = f" that matches {hub.answer_pattern!r}" if hub.answer_pattern else ""
    return StageError(
        f"none of {count} rows of {hub.name} has an answer in {hub.answer_field!r}{pattern}",
        where="data.hub.answer_field",
        fix="data.hub.answer_field=NAME and data.hub.answer_pattern=REGEX (one group; null: the whole field)",
    )


def _stream(cfg: DataSourceConfig):
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    assert cfg.hub is not None
    where = f"data.hub.name={cfg.hub.name}"
    try:
        dataset = load_dataset(
            cfg.hub.name, cfg.hub.config, split=cfg.hub.split, revision=cfg.hub.revision, streaming=True
        )
        yield from dataset
    except DatasetNotFoundError as error:
        fix = "check the spelling; a gated or private data set needs `hf auth login` (or HF_TOKEN)"
        raise StageError(f"the hub has no data set {cfg.hub.name!r} for you", where=where, fix=fix) from error
    except ValueError as error:
        raise StageError(_first_line(error), where=where, fix="data.hub.config=…, data.hub.split=…") from error
    except OSError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        hint = "HF_HUB_OFFLINE is set: unset it" if offline else "check the network (HF_ENDPOINT names a mirror)"
        raise StageError(
            f"the hub cannot be reached for {cfg.hub.name} ({_first_line(error)})",
            where=where,
            fix=f"{hint}; or use files of yours: data.path=FILE; or data=demo_text (no hub needed)",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
