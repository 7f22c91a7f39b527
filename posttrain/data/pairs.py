"""Rows that hold an answer apart from its prompt: preference pairs, and prompts with a completion, in one normal form.

A prompt and its answers are all strings, or all lists of turns (TRL's conversational form).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.chat import normal_messages, plain_text

Turns = list[dict[str, str]]
Side = str | Turns

ANSWERS = {"preference": ("chosen", "rejected"), "prompt": ("completion",)}
"""Kind of row to the fields that hold answers to its `prompt`."""


UNFINISHED = "unfinished"
"""Field of a row that names the answers that were cut off, so that nobody learns that they end there."""


class UnusableAnswers(ValueError):
    """A row that means to have answers and lacks something; the message says what."""


def answers_kind(row: Mapping[str, Any]) -> str | None:
    """`preference` or `prompt` for a row that has such fields, None for any other row."""
    if "chosen" in row or "rejected" in row:
        return "preference"
    return "prompt" if "prompt" in row and "completion" in row else None


def normal_answers(row: Mapping[str, Any]) -> dict[str, Side]:
    """The row's `prompt` and answers in normal form, all strings or all turns.

    Where a preference has no prompt of its own, or a string beside whole conversations, the turns that its two sides
    begin with are the prompt.

    Raises:
        UnusableAnswers: a field is missing, or is neither text nor turns.
    """
    kind = answers_kind(row)
    assert kind is not None
    missing = [name for name in ANSWERS[kind] if row.get(name) is None]
    if missing:
        present = ", ".join(name for name in ("prompt", *ANSWERS[kind]) if row.get(name) is not None)
        raise UnusableAnswers(f"the row has no `{missing[0]}` (of prompt and answers it has: {present or 'none'})")
    found = {name: _side(row[name], name) for name in ("prompt", *ANSWERS[kind]) if row.get(name) is not None}
    if kind == "preference" and not isinstance(found["chosen"], str) and not isinstance(found["rejected"], str):
        found = _with_shared_prompt(found)
    if "prompt" not in found:
        raise UnusableAnswers("the row has no `prompt`, and its two sides do not begin with the same turns")
    if not found["prompt"]:
        raise UnusableAnswers("the prompt is empty")
    if all(isinstance(value, str) for value in found.values()):
        return found
    return {name: _as_turns(value, "user" if name == "prompt" else "assistant") for name, value in found.items()}


def answered_text(answers: Mapping[str, Side]) -> str:
    """The prompt with its (chosen) answer as plain text, for counting and for stages that read text."""
    prompt, answer = answers["prompt"], answers.get("completion", answers.get("chosen", ""))
    return prompt + answer if isinstance(prompt, str) else plain_text([*prompt, *answer])


def prompt_text(answers: Mapping[str, Side]) -> str:
    """The prompt as plain text: rows with the same prompt belong to the same split."""
    prompt = answers["prompt"]
    return prompt if isinstance(prompt, str) else plain_text(prompt)


def _side(value: Any, name: str) -> Side:
    if isinstance(value, str):
        return value
    turns = normal_messages(value)
    if turns is None:
        raise UnusableAnswers(
            f'`{name}` must be a text, or turns [{{"role": "user", "content": "..."}}, ...] of system, user, assistant'
        )
    return turns


def _with_shared_prompt(found: dict[str, Side]) -> dict[str, Side]:
    """Whole conversations on both sides: what they share is the prompt, if none but a string is given."""
    chosen, rejected, prompt = found["chosen"], found["rejected"], found.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        return found
    shared = 0
    # At least one turn stays on each side: two equal sides are a pair that says nothing, and not a prompt.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        return found
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _as_turns(value: Side, role: str) -> Turns:
    return [{"role": role, "content": value}] if isinstance(value, str) else value
