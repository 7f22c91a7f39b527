"""Evaluations with a needle in reports: table by length, plots by depth, comparisons, cards, limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from fabricated_run import DISTILLED, LABEL, FabricatedRun, dataset_outputs, evaluation_artifact, model_output

from posttrain.methods.evaluation.config import EvaluateConfig, NeedleSettings
from posttrain.methods.evaluation.haystack import Needle, Prompt
from posttrain.methods.evaluation.intervals import NO_DIFFERENCE
from posttrain.methods.evaluation.needle import Measured
from posttrain.pipeline.context import StageContext
from posttrain.report import card
from posttrain.report.blocks import Bullets, Figure, Heading, Table
from posttrain.report.card_text import render
from posttrain.report.comparison import best, entries_of, metrics
from posttrain.report.content import content
from posttrain.report.facts import estimates
from posttrain.report.limits import limits
from posttrain.report.needle import needles
from posttrain.report.read import read_run

SETTINGS = NeedleSettings(lengths=[2048, 8192], depths=2, samples=2, candidates=8)
RIGHT = {"model": {2048: [1, 1, 1, 0], 8192: [0, 0, 1, 0]}, "baseline": {2048: [1, 1, 1, 1], 8192: [1, 1, 1, 1]}}


def result(models: tuple[str, ...]) -> dict:
    """As the stage makes it of those answers; only every other one that was chosen was written too."""
    prompts, found = [], {name: [] for name in models}
    for length in SETTINGS.lengths:
        for number in range(4):
            needle = Needle("number", "Oslo", "1234567", ("1234567", "7654321"))
            prompts.append(Prompt(length, float(number // 2), number % 2, needle, 0.0, [0] * (length - 24), [[1], [2]]))
            for name in models:
                right = bool(RIGHT[name][length][number])
                found[name].append({"choice": right, "accuracy": right and number % 2 == 0,
                                    "logprob": -0.25 - number if right else -9.0, "text": ""})  # fmt: skip
    ctx = StageContext("evaluate", EvaluateConfig(needle=SETTINGS), Path(), seed=3)
    return Measured(prompts, found, ctx).figures()


def a_run(outputs: Path, models: tuple[str, ...] = ("model", "baseline"), name: str = "demo-1a2b3c4d") -> Path:
    run = FabricatedRun(outputs, name)
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL, source="package")})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage("train", "sft", {"model": "model", "data": "data.train"}, artifact={"outputs": model_output()})
    inputs = {"model": "train.model", "data": "data.heldout"} | ({"baseline": "model"} if len(models) > 1 else {})
    run.stage("evaluate", "evaluate", inputs, artifact=evaluation_artifact(DISTILLED, "Yes.", **result(models)))
    return run.finish()


def table(run) -> Table:
    return next(block for block in needles(run) if isinstance(block, Table))


def test_the_table_sets_the_models_beside_each_other_at_every_length(tmp_path: Path) -> None:
    found = table(read_run(a_run(tmp_path)))
    assert found.header == ["evaluate", "tokens", "prompts", "most likely of 8 (chance 12.5 %)",
                            "in the greedy answer", "log p(key), nats"]  # fmt: skip
    assert [line[:3] for line in found.rows] == [
        [label, length, "4"]
        for length in ("2,048", "8,192")
        for label in (LABEL, "after train", "difference, paired by prompt")
    ]
    assert found.rows[0][3:5] == ["100.0 % (51.0 to 100.0)", "50.0 % (15.0 to 85.0)"]
    assert found.rows[1][3:5] == ["75.0 % (30.1 to 95.4)", "50.0 % (15.0 to 85.0)"]
    assert found.rows[0][5].startswith("-1.750 (")
    assert found.rows[2][4] == f"+0.0 points (+0.0 to +0.0): {NO_DIFFERENCE}"
    assert found.rows[5][3].startswith("-75.0 points (-100.0 to ")
    assert found.rows[5][5].startswith("-5.562 (") and found.rows[5][5].endswith(": worse")


def test_plots_are_drawn_by_depth_and_conditions_are_told(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    figure = next(block for block in needles(run) if isinstance(block, Figure))
    assert [name for name, _ in figure.panels] == ["needle_choice_evaluate", "needle_logprob_evaluate"]
    assert all(png.startswith(b"\x89PNG") and len(png) > 4000 for _, png in figure.panels)
    assert "in 2,048 and 8,192 tokens" in figure.caption and "2 prompts a point" in figure.caption
    told = " ".join(next(block for block in needles(run) if isinstance(block, Bullets)).items)
    assert "key (number)" in told and "2 depths, 2 prompts each" in told and "24 tokens for the answer" in told
    assert "the easiest retrieval" in told


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path, ("model",)))
    assert [line[0] for line in table(run).rows] == ["after train", "after train"]
    text = render(card.model_card(run, run.stage("train"), "model"))
    assert "in this model 75.0 % (30.1 to 95.4) of 4 prompts, and in the greedy answer in 50.0 %" in text


def test_the_report_has_it_and_says_what_it_does_not_show(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    assert "Needle in a haystack" in [block.text for block in content(run) if isinstance(block, Heading)]
    said = " ".join(list(limits(run))[1].items)
    assert "one hidden sentence alone, up to 8192 tokens" in said and "longer contexts were not tried" not in said
    plain = FabricatedRun(tmp_path, "plain-00000000")
    plain.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    plain.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    plain.stage(
        "evaluate", "evaluate", {"model": "model", "data": "data.heldout"}, artifact=evaluation_artifact(DISTILLED, "a")
    )
    run = read_run(plain.finish())
    assert not list(needles(run)) and "longer contexts were not tried" in " ".join(list(limits(run))[1].items)
    assert card.model_card(run, run.stage("model"), "model")["evaluations"][0]["needle"] is None


def test_comparisons_have_it_and_mark_the_highest(tmp_path: Path, monkeypatch) -> None:
    folders = [a_run(tmp_path, name="one-00000000")]
    monkeypatch.setitem(RIGHT, "model", RIGHT["baseline"])
    folders.append(a_run(tmp_path / "other", name="two-00000000"))
    found = metrics(entries_of(folders))
    assert found["evaluate: needle_choice@8192"] == [0.25, 1.0]
    assert best("evaluate: needle_choice@8192", found["evaluate: needle_choice@8192"]) == 1.0
    assert found["evaluate: needle_logprob@2048"] == [pytest.approx(-3.1875), pytest.approx(-1.75)]
    assert best("evaluate: needle_logprob@2048", found["evaluate: needle_logprob@2048"]) == pytest.approx(-1.75)
    assert len(found) == 2 + 4


def test_the_estimate_is_compared_with_prompts_counted(tmp_path: Path) -> None:
    found = [one for one in estimates(read_run(a_run(tmp_path))) if one.quantity == "tokens processed"]
    assert [one.measured for one in found] == [20480 * 2 + 2 * 4 * (2048 + 8192 - 48)]


def test_the_card_has_a_line_for_each_length(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    found = card.model_card(run, run.stage("train"), "model")
    needle = found["evaluations"][0]["needle"]
    assert needle["lengths"]["8192"]["model"]["choice"] == 0.25
    assert needle["lengths"]["8192"]["difference"]["logprob_verdict"] == "worse"
    text = render(found)
    assert (
        "evaluate: a key hidden in 8,192 tokens is the most likely of 8 (chance 12.5 %) in this model 25.0 % "
        f"(4.6 to 69.9) against {LABEL} 100.0 % (51.0 to 100.0) of 4 prompts, and in the greedy answer in 25.0 % "
        "against 50.0 %"
    ) in text
