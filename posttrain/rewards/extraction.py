"""The final answer in a completion, in time linear in its length for every format but a user's own pattern."""

from __future__ import annotations

import re
from collections import deque

from posttrain.rewards.config import AnswerFormat

BOXED = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""What `last_boxed` stops at: an opening, an escaped character (`\\{` is no brace), a brace."""


def find_answer(completion: str, answer: AnswerFormat) -> str | None:
    """The final answer without the white space around it; None if there is none.

    A user's pattern (`find: regex`) may take for ever: use it within a `posttrain.rewards.pool.Pool`.
    """
    match answer.find:
        case "tag":
            return last_tag(completion, answer.tag)
        case "boxed":
            return last_boxed(completion)
        case "last_line":
            return _or_none(completion.rstrip().rpartition("\n")[2])
        case "whole":
            return _or_none(completion)
        case "regex":
            return last_match(completion, str(answer.pattern))


def last_tag(text: str, tag: str) -> str | None:
    """What stands in the last complete `<tag>…</tag>`; the innermost opening counts. None if it is blank."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    start = text.rfind(opening, 0, max(0, text.rfind(closing)))
    if start < 0:
        return None
    start += len(opening)
    return _or_none(text[start : text.index(closing, start)])


def last_boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` whose braces balance, an outer one before those within it."""
    open_braces: list[tuple[int, bool]] = []  # where its content begins, and whether `\boxed` opened it
    best: tuple[int, int] | None = None
    for found in BOXED.finditer(text):
        word = found.group()
        if word == "}" and open_braces:
            start, boxed = open_braces.pop()
            if boxed and (best is None or start < best[0] or start > best[1]):
                best = (start, found.start())
        elif word == "{" or word.startswith("\\boxed"):
            open_braces.append((found.end(), word != "{"))
    return _or_none(text[best[0] : best[1]]) if best else None


def last_match(text: str, pattern: str) -> str | None:
    """The one group of the last match; None if there is no match, or the group took no part in it."""
    last = deque(re.finditer(pattern, text), maxlen=1)
    return _or_none(last[0].group(1) or "") if last else None


def _or_none(text: str) -> str | None:
    return text.strip() or None
