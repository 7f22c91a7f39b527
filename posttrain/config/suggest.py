"""The nearest valid name to what was typed."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option most like `word`, or None when nothing is like it."""
    from difflib import get_close_matches

    by_folded = {option.casefold().replace("-", "_"): option for option in options}
    found = get_close_matches(word.casefold().replace("-", "_"), by_folded, n=1, cutoff=0.55)
    return by_folded[found[0]] if found else None


def among(options: Iterable[str], limit: int = 12) -> str:
    """The options as one readable list, cut after `limit`."""
    names = sorted(options)
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
