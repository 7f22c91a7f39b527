"""The report says which model a gate kept, with the figures of both."""

from __future__ import annotations

from pathlib import Path

from posttrain.report.blocks import Notice, Table
from posttrain.report.content import content
from posttrain.report.gates import gates
from posttrain.report.read import RunRecord, StageRecord


def run(**result) -> RunRecord:
    manifest = {"metrics": {"result": result}}
    stages = [
        StageRecord("data", "data_source", "k", {}, "done"),
        StageRecord("prefer", "x", "k", {}, "done", "", manifest),
    ]
    return RunRecord(Path("."), "r", "recipe", "", [], 0, stages)


GATE = {"reason": "pair_accuracy fell from 0.5 to 0.4", "before": {"pair_accuracy": 0.5}, "pairs": 7}
GATE |= {"after": {"pair_accuracy": 0.4, "reward_margin": 0.1}, "documents": 0}


def test_an_input_that_was_kept_is_a_notice() -> None:
    record = run(kept="input", gate=GATE)
    blocks = list(gates(record))
    notice = next(block for block in blocks if isinstance(block, Notice))
    assert "prefer passes on its input model, unchanged: pair_accuracy fell" in notice.text
    table = next(block for block in blocks if isinstance(block, Table))
    assert table.rows == [["pair accuracy", "0.5000", "0.4000"], ["reward margin", "–", "0.1000"]]
    assert notice in content(record) and table in content(record)


def test_no_gate_no_section() -> None:
    assert not list(gates(run(kept=1)))
    assert not any(isinstance(block, Notice) for block in gates(run(kept="trained", gate=GATE)))
