"""Caches with constant states in the report and the card of a fabricated run, from its manifests to the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated_run import CONVERTED, FabricatedRun, complete_run, dataset_outputs, evaluation_artifact, model_output

from posttrain.report import build, card_text, cards
from posttrain.report.read import read_run

HEADING = "## Cache with and without constant states"
LENGTHS = ("2048", "8192", "32768", "131072")
PLANNED = {
    "cache_bytes_per_token": 1_280,
    "cache_state_bytes": 6_586_368,
    "cache_ratio_without_states": 0.0390625,
    "cache_ratio_with_states": dict(zip(LENGTHS, (0.1372, 0.0636, 0.0452, 0.0406), strict=True)),
}
MEASURED = {
    "kv_bytes_per_token_predicted": 2_560,
    "kv_bytes_per_token_measured": 2_560,
    "kv_constant_bytes": 6_881_280,
    "kv_constant_bytes_predicted": 6_881_280,
    "cache_ratio_without_states": 0.0390625,
    "cache_ratio_with_states": dict(zip(LENGTHS, (0.0903, 0.0519, 0.0423, 0.0399), strict=True)),
}
SOURCE = {
    "baseline_kv_constant_bytes_predicted": 0,
    "baseline_cache_ratio_without_states": 1.0,
    "baseline_cache_ratio_with_states": dict.fromkeys(LENGTHS, 1.0),
}


def hybrid_run(outputs: Path, **changes: Any) -> Path:
    run = FabricatedRun(outputs)
    run.stage("model", "model_source", {}, artifact={"outputs": model_output("tiny", source="package")})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    made = {"outputs": model_output(), "estimate": PLANNED}
    run.stage("assemble", "assemble", {"state": "model", "attention": "model"}, artifact=made)
    inputs = {"model": "assemble.model", "baseline": "model", "data": "data.heldout"}
    artifact = evaluation_artifact(CONVERTED, "Yes.", **{**MEASURED, **SOURCE, **changes})
    run.stage("evaluate", "evaluate", inputs, artifact=artifact)
    return run.finish()


def report_of(folder: Path) -> str:
    build(folder)
    return (folder / "report.md").read_text(encoding="utf-8")


def card_of(folder: Path, stage: str) -> str:
    run = read_run(folder)
    found = run.stage(stage)
    assert found is not None
    return card_text.render(cards.card_of(run, found, "model"))


def test_the_report_sets_the_hybrid_beside_its_source(tmp_path: Path) -> None:
    text = report_of(hybrid_run(tmp_path))
    header, _, *rows = text.partition(HEADING)[2].strip().partition("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in (header, *rows)]
    at = [f"with, {length} tokens" for length in ("2,048", "8,192", "32,768", "131,072")]
    assert cells == [
        ["model", "precision", "B/token", "B/sequence, measured", "predicted", "without states", *at],
        ["source", "fp32", "46,080", "0", "0", "100.0 %", *["100.0 %"] * 4],
        ["after assemble", "fp32", "2,560", "6,881,280", "6,881,280", "3.9 %", "9.0 %", "5.2 %", "4.2 %", "4.0 %"],
    ]


def test_the_headline_gives_both_figures(tmp_path: Path) -> None:
    summary = report_of(hybrid_run(tmp_path)).partition("## Results")[0]
    assert (
        "equal to the prediction to the byte. Constant states add 6,881,280 B a sequence: 9.0 % at 2,048, "
        "5.2 % at 8,192, 4.2 % at 32,768, 4.0 % at 131,072 tokens of plain attention's cache."
    ) in summary


def test_a_constant_part_unlike_its_prediction_is_not_called_equal(tmp_path: Path) -> None:
    summary = report_of(hybrid_run(tmp_path, kv_constant_bytes=6_881_284)).partition("## Results")[0]
    assert "the prediction differs, see the table" in summary and "to the byte" not in summary


def test_the_card_gives_both_figures_planned_and_measured(tmp_path: Path) -> None:
    text = card_of(hybrid_run(tmp_path), "assemble")
    assert (
        "KV cache: 1,280 bytes per token in bf16 and 6,586,368 bytes per sequence, states in fp32: 3.91% of plain "
        "attention's without the states (what papers print); with them 13.7% at 2k, 6.4% at 8k, 4.5% at 32k, "
        "4.1% at 128k tokens (by formula)"
    ) in text
    assert (
        "evaluate: the cache holds 6,881,280 bytes per sequence besides, measured (6,881,280 predicted), states in "
        "fp32: 3.91% of plain attention's without the states (what papers print); with them 9.0% at 2k, 5.2% at 8k, "
        "4.2% at 32k, 4.0% at 128k tokens"
    ) in text


@pytest.mark.parametrize("word", ["per sequence", "states in fp32", "Constant states", HEADING])
def test_nothing_is_said_of_states_where_there_are_none(word: str, tmp_path: Path) -> None:
    folder = complete_run(tmp_path)
    assert word not in report_of(folder) and word not in card_of(folder, "distill")
