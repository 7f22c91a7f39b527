"""Numbers as printed, lanes of the graph, labels of axes."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated_run import complete_run

from posttrain.report.blocks import Node
from posttrain.report.facts import _peak, estimates
from posttrain.report.graph import lanes, svg
from posttrain.report.numbers import byte_size, duration, percent, significant, whole, with_interval
from posttrain.report.plots import short_label
from posttrain.report.read import read_run


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0.000"), (16.324, "16.32"), (1234.5, "1234"), (123456.7, "123,457"), (0.04317, "0.04317"),
     (3.2e-7, "3.200e-07"), (100.0, "100.0")],
)  # fmt: skip
def test_significant(value, text: str) -> None:
    assert significant(value) == text


def test_other_numbers() -> None:
    assert with_interval({"kl": 0.5, "kl_low": 0.25, "kl_high": 0.75}, "kl") == "0.5000 (0.2500 to 0.7500)"
    assert with_interval({"kl": 0.5}, "kl") == "0.5000" and with_interval({}, "kl") == "–"
    assert percent(0.1234) == "12.3 %" and whole(1234567) == "1,234,567" and whole(2.5) == "2.5"
    assert [byte_size(n) for n in (0, 1023, 1024, 3 * 2**29)] == ["0 B", "1023 B", "1.00 KiB", "1.50 GiB"]
    assert [duration(s) for s in (1.25, 200, 7500)] == ["1.2 s", "3 min 20 s", "2 h 05 min"]


def node(name: str, *parents: str) -> Node:
    return Node(name, "type", "done", [("input", parent) for parent in parents])


def test_two_stages_never_share_a_lane_while_both_are_needed() -> None:
    nodes = [node("a"), node("b"), node("c", "a"), node("d", "b", "c"), node("e", "d")]
    found = dict(zip("abcde", lanes(nodes), strict=True))
    assert len({found["a"], found["b"]}) == 2 and len({found["b"], found["c"]}) == 2
    assert found["e"] in (found["a"], found["b"], found["c"]), "a lane is used again once its stage is no longer needed"


def test_the_graph_names_every_stage_and_escapes_it() -> None:
    text = svg([node("a"), node("<b>", "a")])
    assert "&lt;b&gt;" in text and "<b>" not in text and text.count("<path") == 1


def test_the_plans_cache_is_compared_in_the_precision_that_was_measured(tmp_path: Path) -> None:
    found = [item for item in estimates(read_run(complete_run(tmp_path))) if item.quantity.startswith("KV cache")]
    assert {(item.quantity, item.estimated, item.measured) for item in found} == {
        ("KV cache per token (fp32)", 7680, 7680)
    }


def test_the_hosts_memory_is_not_compared_with_a_devices() -> None:
    assert _peak({"device": "cpu", "process_peak_bytes": 7}) == 7
    assert _peak({"device": "cuda", "process_peak_bytes": 7}) is None
    assert _peak({"device": "cuda", "process_peak_bytes": 7, "device_peak_bytes": 5}) == 5


def test_labels_of_axes_are_broken_at_words() -> None:
    assert short_label("after distill") == "after distill"
    assert short_label("after a_very_long_stage_name").count("\n") >= 1


def test_the_headline_compares_caches_of_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.report import content, facts
    from posttrain.report.facts import Row

    def row(label: str, precision: str, cache: int) -> Row:
        values = {"perplexity": 20.0, "nll": 3.0, "precision": precision, "kv_bytes_per_token_measured": cache}
        return Row(label, "evaluate", {**values, "kv_bytes_per_token_predicted": cache}, {})

    rows = [row("source", "fp32", 512), row("after distill", "fp32", 128)]
    monkeypatch.setattr(facts, "rows", lambda run: rows)
    monkeypatch.setattr(facts, "recoveries", lambda run: [])
    assert "KV cache per token in fp32: 512 B to 128 B (25.0 %)" in content._headline(None)
    rows[1] = row("after distill", "bf16", 64)
    assert "KV cache" not in content._headline(None)
