"""The table a benchmark run ends with: every time beside the best correct peer's and the physical limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from benchmarks.harness import Measurement, is_ours

HEAD = ("operator", "implementation", "median ms", "p10-p90", "peak MiB", "x best peer", "x limit", "error", "verdict")


def table(results: Iterable[Measurement]) -> str:
    """Lines of text, one an implementation, cases apart; ratios are time over time, so below 1 is faster."""
    lines = []
    for key, group in groupby(results, key=lambda result: (result.case.operator, result.case.shape, result.case.dtype)):
        lines.append(("", *[""] * (len(HEAD) - 1)))
        lines.append((" ".join(key), *[""] * (len(HEAD) - 1)))
        lines += _case_lines(list(group))
    rows = [HEAD, *lines]
    widths = [max(len(row[i]) for row in rows if i or not row[-1] == "") for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def best_peer(results: Sequence[Measurement]) -> Measurement | None:
    """The fastest implementation of others whose numbers are right; None when there is none."""
    peers = [result for result in results if not is_ours(result.implementation) and result.correct and result.timing]
    return min(peers, key=lambda result: result.timing.median_ms, default=None)


def _case_lines(results: Sequence[Measurement]) -> list[tuple[str, ...]]:
    best = best_peer(results)
    return [_line(result, best) for result in results]


def _line(result: Measurement, best: Measurement | None) -> tuple[str, ...]:
    name = (f"  {result.case.direction}", result.implementation)
    if result.timing is None:
        return (*name, "", "", "", "", "", "", result.reason)
    timing, peak = result.timing, result.peak_mib
    return (
        *name,
        f"{timing.median_ms:.4g}",
        f"{timing.low_ms:.4g}-{timing.high_ms:.4g}",
        "" if peak is None else f"{peak:.0f}",
        # a wrong result has no place in a comparison of speed
        f"{timing.median_ms / best.timing.median_ms:.2f}" if best and result.correct else "",
        f"{timing.median_ms / result.limit_ms:.2f}" if result.limit_ms and result.correct else "",
        f"{max(result.errors.values(), default=0):.1e}",
        "right" if result.correct else result.reason,
    )
