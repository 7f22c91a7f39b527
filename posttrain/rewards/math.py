"""Whether an answer equals the right one as mathematics (math-verify).

Its own time limits are alarm signals, which work in a main thread only; they are off, and the pool's deadline counts.
Text never reaches an interpreter: LaTeX is parsed by a grammar, and plain text is evaluated only where it consists of
digits, operators and brackets.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

LONGEST = 10_000
"""Characters of an answer that are looked at: a final answer is shorter, and parsing takes more than linear time."""

DELIMITED = re.compile(r"\$[^$]+\$|\\\(|\\\[|\\boxed")
WORD = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
"""A word of prose: no command of LaTeX, and not the first in braces, as in `\\text{cm}`."""

# It says at every first call of a process that it was told to have no time limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def warm() -> None:
    """Do what the first answer of a process would else pay for: the grammar's tables take a quarter of a second."""
    score(r"\frac{1}{2}", "0.5", 6)


def score(answer: str, gold: str, decimals: int) -> tuple[float | None, str]:
    """1 if the answer equals `gold`, 0 if not, and what it counts as beside that ("": nothing).

    None where the right answer cannot be parsed. Takes any time and memory: use a pool.

    Args:
        answer, gold: LaTeX or plain text, with or without `$`.
        decimals: places that numbers are compared to.
    """
    right = parsed_gold(gold)
    if not right:
        return None, "gold_failures"
    found = parsed(answer) if len(answer) <= LONGEST else []
    if not found:
        return 0.0, "parse_failures"
    return float(verify(list(right), found, float_rounding=decimals, timeout_seconds=None)), ""


@lru_cache(maxsize=4096)
def parsed_gold(gold: str) -> tuple[Any, ...]:
    """What a right answer means; empty if it cannot be parsed."""
    return tuple(parsed(gold))


def parsed(text: str) -> list[Any]:
    """What a text means: an expression of sympy first, and the text of it; empty if there is none."""
    text = text.replace("\0", "").strip()
    bare = not (DELIMITED.search(text) or "$" in text or WORD.search(text))
    return parse(f"${text}$" if bare else text, parsing_timeout=None)
