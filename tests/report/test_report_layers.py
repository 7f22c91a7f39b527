"""What an alignment and a choice of layers show in the report."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from posttrain.report.blocks import Figure, Heading, Table, Text
from posttrain.report.layers import by_layer
from posttrain.report.read import StageRecord


def stage(name: str, **result) -> StageRecord:
    return StageRecord(name, "type", "key", {}, "done", "", {"metrics": {"result": result}}, Path("."))


def run(*stages: StageRecord) -> SimpleNamespace:
    return SimpleNamespace(stages=list(stages))


def test_losses_before_and_after_and_the_least_fall() -> None:
    aligned = stage("align", first_layer_losses=[10.0, 4.0, 2.0], last_tenth_layer_losses=[2.0, 3.0, 1.0])
    heading, table, figure = by_layer(run(stage("other", loss=1.0), aligned))
    assert isinstance(heading, Heading) and isinstance(table, Table) and isinstance(figure, Figure)
    assert table.rows == [["align", "16.00", "6.000", "25.0 % (layer 1)", "50.0 %"]]
    assert [name for name, _ in figure.panels] == ["layers_align"]


def test_a_choice_with_its_scores() -> None:
    chosen = {"kept": [0, 2], "layers": 3, "method": "smart", "kl_kept": 0.5, "feasible": 7}
    _, text, figure = by_layer(run(stage("select", **chosen, kl_none_kept=2.0, scores=[0.9, 0.1, 0.4])))
    assert isinstance(text, Text) and "keeps 2 of 3 layers as attention (smart): 0, 2." in text.text
    assert "without any: 2.000 nats per token, with these: 0.5000." in text.text and "chosen: 7." in text.text
    assert [name for name, _ in figure.panels] == ["scores_select"]


def test_a_choice_without_measurement_and_a_run_without_either() -> None:
    blocks = list(by_layer(run(stage("select", kept=[0], layers=3, method="uniform", kl_kept=0.5))))
    assert "with these: 0.5000 nats per token." in blocks[-1].text and not any(isinstance(b, Figure) for b in blocks)
    assert list(by_layer(run(stage("prefer", kept="input", gate={})))) == []
