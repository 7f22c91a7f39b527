"""Draw the benchmark CSVs: `python kernels/benchmarks/plot.py [--results DIR] [--out DIR]`.

One `bench_<operator>.png` an operator, bars of the newest run of each size and GPU that has something to compare.
Wrong results are drawn hatched and named so, unchecked ones (a peer's samples) are named so; what did not run is named
without a bar; the dashed line is the physical limit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.results import is_ours, newest, read_rows

Row = dict[str, str]
CHECKED = {"true": "", "false": ", WRONG", "": ", not checked"}
OURS_COLOUR, PEER_COLOUR, WRONG_COLOUR = "#0072b2", "#999999", "#d55e00"


def main(argv: list[str] | None = None) -> int:
    """Draw every operator of a results folder; 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "docs" / "results")
    args = parser.parse_args(argv)
    for path in sorted(args.results.glob("*.csv")):
        if path.stem != "ceilings" and (rows := _compared(newest(read_rows(path)))):
            print(draw(rows, args.out / f"bench_{path.stem}.png"))
    return 0


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The rows of cases that have more than one implementation."""
    counts = Counter(_case(row) for row in rows)
    return [row for row in rows if counts[_case(row)] > 1]


def draw(rows: Sequence[Row], path: Path) -> Path:
    """One panel a case (size, dtype, direction, GPU), times left to right; returns the written file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [(key, list(group)) for key, group in groupby(sorted(rows, key=_order), key=_case)]
    heights = [1.0 + 0.32 * sum(_lines(row) for row in group) for _, group in cases]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, (key, group) in zip(axes[:, 0], cases, strict=True):
        _panel(axis, group)
        axis.set_title("  ".join(key), fontsize=8, loc="left")
    axes[-1, 0].set_xlabel("median time, ms (label: ms and peak MiB above the inputs)", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[column] for column in ("operator", "shape", "dtype", "direction", "gpu"))


def _order(row: Row) -> list[tuple[str, int]]:
    """Cases by name, numbers in them by value."""
    return [(words, int(number or 0)) for words, number in re.findall(r"(\D+)(\d*)|$", "  ".join(_case(row)))]


def _panel(axis: Any, rows: Sequence[Row]) -> None:
    """Bars from the top in order of time, those that did not run last."""
    rows = sorted(rows, key=lambda row: _number(row["median_ms"], float("inf")))
    times = [_number(row["median_ms"], 0.0) for row in rows]
    for place, (row, time) in enumerate(zip(rows, times, strict=True)):
        wrong = row["correct"] == "false"
        colour = WRONG_COLOUR if wrong else OURS_COLOUR if is_ours(row["implementation"]) else PEER_COLOUR
        axis.barh(place, time, color=colour, hatch="///" if wrong else None, edgecolor="white")
        axis.text(time, place, " " + _label(row), va="center", fontsize=7)
    axis.set_yticks(range(len(rows)), [_wrapped(row["implementation"]) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(times, default=0.0) or 1.0)
    limits = [_number(row["limit_ms"], 0.0) for row in rows if row["limit_ms"]]
    if limits:
        axis.axvline(min(limits), color="black", linestyle="--", linewidth=0.8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _wrapped(implementation: str) -> str:
    """A name with settings (`name:field=value,…`) in lines of at most two settings."""
    name, colon, settings = implementation.partition(":")
    parts = [f"{name}{colon}", *(f"{part}," for part in settings.split(",") if part)]
    lines = ["".join(parts[:2]), *("".join(parts[i : i + 2]) for i in range(2, len(parts), 2))]
    return "\n".join(lines).rstrip(",")


def _lines(row: Row) -> float:
    """Height of a row in rows of a one-line name."""
    return 1 + _wrapped(row["implementation"]).count("\n") / 2


def _label(row: Row) -> str:
    if not row["median_ms"]:
        return "did not run"
    memory = f", {_number(row['peak_mib'], 0.0):.0f} MiB" if row["peak_mib"] else ""
    return f"{_number(row['median_ms'], 0.0):.3g} ms{memory}" + CHECKED[row["correct"]]


def _number(text: str, default: float) -> float:
    return float(text) if text else default


if __name__ == "__main__":
    sys.exit(main())
