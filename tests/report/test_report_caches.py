"""The report's table of caches with constant states, and the card's line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from posttrain.report import facts
from posttrain.report.blocks import Heading, Table
from posttrain.report.caches import caches
from posttrain.report.card_text import _states


def test_a_row_for_every_model_with_states(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {"2048": 0.137, "8192": 0.064}
    values = {
        "kv_bytes_per_token_measured": 1280,
        "kv_constant_bytes": 6590,
        "kv_constant_bytes_predicted": 6590,
        "cache_ratio_without_states": 0.0391,
        "cache_ratio_with_states": lengths,
    }
    rows = [SimpleNamespace(label="source", values={}), SimpleNamespace(label="after distill", values=values)]
    monkeypatch.setattr(facts, "rows", lambda run: rows)
    heading, table, _ = caches(None)
    assert isinstance(heading, Heading) and isinstance(table, Table)
    assert table.header[-2:] == ["with, 2048 tokens", "with, 8192 tokens"]
    assert table.rows == [["after distill", "1,280", "6,590", "6,590", "3.9 %", "13.7 %", "6.4 %"]]
    rows.pop()
    assert list(caches(None)) == []


def test_the_card_names_the_constant_part() -> None:
    assert _states({"cache_state_bytes": 1234567}) == " and 1,234,567 bytes per sequence, states in fp32"
    assert _states({"cache_state_bytes": None}) == _states({}) == ""
