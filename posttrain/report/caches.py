"""Caches of models that hold constant states: the part that grows, and all of it."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.report import facts
from posttrain.report.blocks import Block, Heading, Table, Text
from posttrain.report.numbers import percent, whole
from posttrain.report.read import RunRecord

RATIOS = "cache_ratio_with_states"


def caches(run: RunRecord) -> Iterator[Block]:
    """A row for every evaluated model with states."""
    rows = [row for row in facts.rows(run) if row.values.get(RATIOS)]
    if not rows:
        return
    lengths = list(rows[0].values[RATIOS])
    yield Heading("Cache with and without constant states")
    yield Table(
        [
            "model",
            "B/token",
            "B/sequence, measured",
            "predicted",
            "without states",
            *(f"with, {n} tokens" for n in lengths),
        ],
        [
            [
                row.label,
                whole(row.values.get("kv_bytes_per_token_measured")),
                whole(row.values.get("kv_constant_bytes")),
                whole(row.values.get("kv_constant_bytes_predicted")),
                percent(row.values.get("cache_ratio_without_states")),
                *(percent(row.values[RATIOS].get(length)) for length in lengths),
            ]
            for row in rows
        ],
    )
    yield Text(
        "Ratios to the cache of plain attention of the same shape, by formula. Papers print the one without states; a "
        "sequence holds them whatever its length."
    )
