"""Problems with a right answer: what asks, what is right, and the fields that rewards score by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.data.chat import normal_messages
from posttrain.data.pairs import Turns
from posttrain.errors import StageError

ANSWER, TESTS, TEST_CODE = "answer", "tests", "test_code"
"""Fields of a row that rewards read, beside `task`: the right answer; a program's inputs and outputs; assertions."""


def with_instruction(question: str, instruction: str | None) -> str:
    """The question and, after a blank line, how it is to be answered."""
    return f"{question}\n\n{instruction}" if instruction else question


def reward_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row that rewards read, in normal form; numbers become text. Others are left out."""
    found: dict[str, Any] = {}
    answer = row.get(ANSWER)
    if isinstance(answer, str | int | float) and not isinstance(answer, bool):
        found[ANSWER] = str(answer)
    if isinstance(row.get(TESTS), list):
        found[TESTS] = row[TESTS]
    if isinstance(row.get(TEST_CODE), str):
        found[TEST_CODE] = row[TEST_CODE]
    return found


def is_lone_prompt(row: Mapping[str, Any], document_field: str | None = None) -> bool:
    """Whether a row has a `prompt` and nothing that could be an answer to it."""
    return "prompt" in row and set(row) <= {"prompt", "id", document_field}


def question_turns(row: Mapping[str, Any], document_field: str | None = None) -> Turns | None:
    """The turns that ask, in `question` or `prompt`, of a row that says how answers are scored; else None.

    A `prompt` by itself asks too: rewards of length and form need no more. Beside further fields it is no such row, as
    those may be a completion under another name.
    """
    asked = row.get("question", row.get("prompt"))
    if not asked or not reward_fields(row) and not is_lone_prompt(row, document_field):
        return None
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else normal_messages(asked)


def prompt_of(row: Mapping[str, Any], where: str = "") -> str | Turns:
    """What a model continues: the turns before the last answer of a conversation, or a row's own `prompt`.

    Raises:
        StageError: the row has neither, or nothing asks in it.
    """
    if row.get("prompt"):
        return row["prompt"]
    messages = normal_messages(row.get("messages"))
    turns = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if not turns:
        fix = "give conversations that begin with a question, or rows with `prompt`"
        raise StageError(f"row {row.get('id')!r} asks nothing", where=where, fix=fix)
    return turns


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a field whose name may lead into others by dots; None if there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def found_answer(text: str, pattern: str | None) -> tuple[str, str] | None:
    r"""The right answer in a text, and the text without the part that held it (all of it for `boxed`).

    None where there is none. `pattern`: one group of which the last match counts, `boxed`, or None for the whole text.
    """
    from posttrain.rewards.extraction import last_boxed

    if pattern is None:
        answer, rest = text.strip(), text
    elif pattern == "boxed":
        answer, rest = last_boxed(text) or "", text
    else:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return None
        answer, rest = (matches[-1].group(1) or "").strip(), text[: matches[-1].start()] + text[matches[-1].end() :]
    return (answer, rest) if answer else None
