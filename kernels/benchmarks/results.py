"""The benchmark CSV: one row a measurement, appended, the same columns for every operator."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLUMNS = (
    "operator",
    "shape",
    "dtype",
    "implementation",
    "direction",
    "median_ms",
    "peak_mib",
    "limit_ms",
    "correct",
    "gpu",
    "torch",
    "triton",
    "date",
)

OURS = "posttrain"
"""The name of our implementation, alone or with settings (`posttrain_…`, `posttrain:…`); all other names are peers."""


def is_ours(implementation: str) -> bool:
    """Whether a name is our implementation, in whatever setting."""
    return implementation == OURS or implementation.startswith((f"{OURS}_", f"{OURS}:"))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append measurements to a CSV, with a header if the file is new.

    Floats are written with four decimals, booleans as `true` or `false`, None as an empty field.

    Raises:
        ValueError: the file has another header, or a row has other keys than `COLUMNS`.
    """
    rows = list(rows)
    for row in rows:
        if set(row) != set(COLUMNS):
            wrong = ", ".join(sorted(set(row) ^ set(COLUMNS)))
            raise ValueError(f"a row for {path} must have exactly the columns of COLUMNS; missing or unknown: {wrong}")
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows([_text(row[column]) for column in COLUMNS] for row in rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a benchmark CSV, every field as it is written.

    Raises:
        ValueError: the file has another header than `COLUMNS`.
    """
    _check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows of the newest run of each (gpu, operator, shape, dtype, direction), in their order."""
    rows = list(rows)
    latest: dict[tuple[str, ...], str] = {}
    for row in rows:
        latest[_case(row)] = max(row["date"], latest.get(_case(row), ""))
    return [row for row in rows if row["date"] == latest[_case(row)]]


def _case(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in ("gpu", "operator", "shape", "dtype", "direction"))


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has the columns {header}, not {list(COLUMNS)}: move it away or write elsewhere")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
