"""Rewards of the text itself: its form and its length."""

from __future__ import annotations

import re


def score(completion: str, pattern: str, whole: bool) -> tuple[float | None, str]:
    """1 if the whole completion, or some part of it, matches the pattern, 0 if not. May take for ever: use a pool."""
    found = re.fullmatch(pattern, completion) if whole else re.search(pattern, completion)
    return float(found is not None), ""


def length_score(length: int, target: int, limit: int) -> float:
    """0 up to `target` tokens, -1 from `limit` on, linear between them."""
    return -min(1.0, max(0.0, (length - target) / (limit - target)))
