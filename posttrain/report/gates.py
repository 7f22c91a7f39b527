"""What gated stages found on held-out data before and after, and which model they passed on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.report.blocks import Block, Heading, Notice, Table, Text
from posttrain.report.numbers import NONE, significant
from posttrain.report.read import RunRecord


def gates(run: RunRecord) -> Iterator[Block]:
    """A table of every stage whose result has a `gate`; a notice where the trained model was not kept."""
    found = [(stage.name, stage.result) for stage in run.stages if isinstance(stage.result.get("gate"), dict)]
    if not found:
        return
    yield Heading("Gates")
    for name, result in found:
        gate, kept = result["gate"], result.get("kept")
        if kept == "input":
            yield Notice(f"{name} passes on its input model, unchanged: {gate.get('reason')}.")
        else:
            yield Text(f"{name} passes on the trained model: {gate.get('reason')}.")
        if rows := _rows(gate):
            yield Table([f"{name}, held-out data", "input model", "trained model"], rows)
        if counts := [f"{gate[what]} {what}" for what in ("pairs", "documents") if gate.get(what)]:
            yield Text(f"Measured on {' and '.join(counts)}.")


def _rows(gate: dict[str, Any]) -> list[list[str]]:
    before, after = (gate.get(side) or {} for side in ("before", "after"))
    return [
        [name.replace("_", " "), significant(before[name]) if name in before else NONE, significant(after.get(name))]
        for name in {**before, **after}
    ]
