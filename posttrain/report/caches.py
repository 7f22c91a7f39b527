"""Caches of models that hold constant states: the part that grows, and all of it."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.report import facts
from posttrain.report.blocks import Block, Heading, Table, Text
from posttrain.report.cache_note import ratios_text
from posttrain.report.numbers import NONE, percent, whole
from posttrain.report.read import Json, RunRecord

RATIOS = "cache_ratio_with_states"


def caches(run: RunRecord) -> Iterator[Block]:
    """A row for every evaluated model with states, and for the source it was compared with."""
    rows = [row for row in facts.rows(run) if row.values.get(RATIOS)]
    if not rows:
        return
    lengths = list(rows[0].values[RATIOS])
    yield Heading("Cache with and without constant states")
    yield Table(
        [
            "model",
            "precision",
            "B/token",
            "B/sequence, measured",
            "predicted",
            "without states",
            *(f"with, {int(n):,} tokens" for n in lengths),
        ],
        [
            [
                row.label,
                str(row.values.get("precision", NONE)),
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
        "sequence holds them whatever its length, and always in fp32: beside a cache in fp32 they weigh half as much "
        "as beside one in bf16, which is what the plan counts."
    )


def beside_growth(values: Json) -> str:
    """For a sentence on bytes per token: what a sequence of that model holds besides; empty without states."""
    if not values.get(RATIOS) or not (constant := values.get("kv_constant_bytes")):
        return ""
    honest = ", ".join(f"{percent(ratio)} at {int(length):,}" for length, ratio in values[RATIOS].items())
    return f" Constant states add {whole(constant)} B a sequence: {honest} tokens of plain attention's cache."


def planned_states(artifact: Json) -> str:
    """For a card's line on bytes per token: constant states and both ratios, where the model has some."""
    if not (constant := artifact.get("cache_state_bytes")):
        return ""
    ratios = f", {ratios_text(artifact)}" if artifact.get(RATIOS) else ", states in fp32"
    return f" and {whole(constant)} bytes per sequence{ratios}"


def measured_states(stage: str, values: Json) -> Iterator[str]:
    """For a card's evaluation: the constant part as it was measured, and its ratios in that precision."""
    if values.get("kv_constant_bytes") and values.get(RATIOS):
        yield (
            f"{stage}: the cache holds {whole(values['kv_constant_bytes'])} bytes per sequence besides, measured "
            f"({whole(values['kv_constant_bytes_predicted'])} predicted), {ratios_text(values)}"
        )
