"""Evaluations with problems in reports: tables, plots, comparisons, cards and what they do not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fabricated_run import DISTILLED, LABEL, FabricatedRun, dataset_outputs, evaluation_artifact, model_output

from posttrain.methods.evaluation.config import ProblemSettings
from posttrain.methods.evaluation.intervals import NO_DIFFERENCE
from posttrain.methods.evaluation.pass_at_k import pass_figures
from posttrain.report import card
from posttrain.report.blocks import Bullets, Figure, Heading, Sample, Table
from posttrain.report.card_text import render
from posttrain.report.comparison import best, entries_of, metrics
from posttrain.report.content import content
from posttrain.report.facts import estimates
from posttrain.report.limits import limits
from posttrain.report.problems import problems
from posttrain.report.read import read_run

COUNTS = {"model": [4, 3, 2, 4, 0, 1], "baseline": [1, 0, 0, 1, 0, 1]}
ANSWERED = {"answers": 24, "tokens": 480, "entropy": 0.625, "mean_tokens": 20.0, "cut_off": 0.25, "parse_failures": 0.5,
            "timeouts": 2, "crashes": 1, "errors": 0}  # fmt: skip


def solved(models: tuple[str, ...] = ("model", "baseline"), places: slice = slice(None)) -> dict:
    return pass_figures({name: COUNTS[name][places] for name in models}, 4, (1, 4), 200, seed=0)


def result(models: tuple[str, ...] = ("model", "baseline"), **changes) -> dict:
    found = solved(models)
    flat = {}
    for name, prefix in (("model", ""), ("baseline", "baseline_"), ("difference", "difference_")):
        flat |= {prefix + key: value for key, value in found.get(name, {}).items()}
    groups = {
        "chain_sum": {"problems": 5, **solved(models, slice(5))},
        "gcd": {"problems": 1, **solved(models, slice(5, 6))},
    }
    detail = {
        "settings": ProblemSettings(samples=4, k=[1, 4]).model_dump(mode="json", exclude={"pool"}),
        "problems": 6,
        "left_out": {"without": 0, "too_long": 3, "unscorable": 1},
        "answers": {name: ANSWERED for name in models},
        "by_task": groups,
        "by_difficulty": {},
        **changes,
    }
    return {**flat, "problems": detail}


def a_run(
    outputs: Path, models: tuple[str, ...] = ("model", "baseline"), name: str = "demo-1a2b3c4d", **changes
) -> Path:
    run = FabricatedRun(outputs, name)
    run.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL, source="package")})
    run.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    run.stage("train", "sft", {"model": "model", "data": "data.train"}, artifact={"outputs": model_output()})
    artifact = evaluation_artifact(DISTILLED, "Yes.", **result(models, **changes))
    texts = {name: [f"{name} <answer>", ""] for name in models}
    shown = [{"id": "p0", "prompt": "1 + 1?", "answer": "2", **texts}]
    artifact["outputs"]["evaluation"][2]["answers.json"] = json.dumps(shown)
    inputs = {"model": "train.model", "data": "data.heldout"} | ({"baseline": "model"} if len(models) > 1 else {})
    run.stage("evaluate", "evaluate", inputs, artifact=artifact)
    return run.finish()


def tables(run) -> list[Table]:
    return [block for block in problems(run) if isinstance(block, Table)]


def test_the_table_sets_model_against_baseline_with_their_paired_difference(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    table = tables(run)[0]
    assert table.header == ["evaluate", "problems", "pass@1 (95 % interval)", "pass@4 (95 % interval)"]
    assert [line[:2] for line in table.rows] == [
        [LABEL, "6"],
        ["after train", "6"],
        ["difference, paired by problem", "6"],
    ]
    figures = solved()
    low, high = (100 * figures["model"][f"pass@1_{end}"] for end in ("low", "high"))
    assert table.rows[1][2] == f"58.3 % ({low:.1f} to {high:.1f})"
    low, high = (100 * figures["difference"][f"pass@1_{end}"] for end in ("low", "high"))
    assert table.rows[2][2] == f"+45.8 points ({low:+.1f} to {high:+.1f}): better"


def test_groups_have_a_table_and_a_verdict_each(tmp_path: Path) -> None:
    table = tables(read_run(a_run(tmp_path)))[1]
    assert table.header == ["task", "problems", f"{LABEL}: pass@1", "after train: pass@1", f"{LABEL}: pass@4",
                            "after train: pass@4", "difference of pass@1"]  # fmt: skip
    assert [line[:2] for line in table.rows] == [["chain_sum", "5"], ["gcd", "1"]]
    assert table.rows[1][2:] == [
        "25.0 %",
        "25.0 %",
        "100.0 %",
        "100.0 %",
        "+0.0 points: too few problems for an interval",
    ]
    assert table.rows[0][-1].startswith("+55.0 points (") and table.rows[0][-1].endswith(": better")


def test_answers_settings_and_samples_are_told(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    assert tables(run)[2].rows == [
        [name, "0.6250", "20.00", "25.0 %", "50.0 %", "3"] for name in (LABEL, "after train")
    ]
    told = " ".join(next(block for block in problems(run) if isinstance(block, Bullets)).items)
    assert "4 answers to each problem at temperature 1.0, at most 128 tokens; right by reward gym" in told
    assert "Left out: 3 too long, 1 could not be scored." in told and "top_p 0" not in told
    sample = next(block for block in problems(run) if isinstance(block, Sample))
    assert sample.prompt == "1 + 1?"
    assert sample.answers == [
        ("right answer", "2"),
        (LABEL, "baseline <answer>"),
        (LABEL, "(nothing)"),
        ("after train", "model <answer>"),
        ("after train", "(nothing)"),
    ]


def test_filters_are_told_where_they_are_on(tmp_path: Path) -> None:
    settings = ProblemSettings(samples=4, k=[1, 4], top_p=0.9, top_k=7).model_dump(mode="json", exclude={"pool"})
    run = read_run(a_run(tmp_path, settings=settings, left_out={"without": 0}))
    told = " ".join(next(block for block in problems(run) if isinstance(block, Bullets)).items)
    assert "temperature 1.0, top_p 0.9, top_k 7, at most" in told and "Left out" not in told


def test_plots_are_drawn_of_everything_and_of_groups(tmp_path: Path) -> None:
    levels = {str(level): {"problems": 5, **solved(places=slice(5))} for level in (0, 1)}
    run = read_run(a_run(tmp_path, by_difficulty=levels))
    figure = next(block for block in problems(run) if isinstance(block, Figure))
    assert [name for name, _ in figure.panels] == [
        "pass_at_k_evaluate",
        "pass_at_1_by_task_evaluate",
        "pass_at_1_by_difficulty_evaluate",
    ]
    assert all(png.startswith(b"\x89PNG") and len(png) > 4000 for _, png in figure.panels)
    assert "6 problems" in figure.caption
    assert len(tables(run)) == 4


def test_without_a_baseline_there_is_no_difference(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path, ("model",)))
    assert [line[0] for line in tables(run)[0].rows] == ["after train"]
    assert tables(run)[1].header == ["task", "problems", "after train: pass@1", "after train: pass@4"]
    assert len(tables(run)[1].rows[0]) == 4


def test_a_difference_that_is_not_there_is_called_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(COUNTS, "model", COUNTS["baseline"])
    assert tables(read_run(a_run(tmp_path)))[0].rows[2][2] == f"+0.0 points (+0.0 to +0.0): {NO_DIFFERENCE}"


def test_the_report_has_them_and_says_what_they_do_not_show(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    assert "Problems" in [block.text for block in content(run) if isinstance(block, Heading)]
    said = " ".join(list(limits(run))[1].items)
    assert "Skill at other tasks than the problems above" in said and "Intervals of pass@k cover" in said
    plain = FabricatedRun(tmp_path, "plain-00000000")
    plain.stage("model", "model_source", {}, artifact={"outputs": model_output(LABEL)})
    plain.stage("data", "data_source", {}, artifact={"outputs": dataset_outputs()})
    plain.stage(
        "evaluate", "evaluate", {"model": "model", "data": "data.heldout"}, artifact=evaluation_artifact(DISTILLED, "a")
    )
    run = read_run(plain.finish())
    assert not list(problems(run)) and "pass@k" not in " ".join(list(limits(run))[1].items)


def test_comparisons_have_pass_at_k_and_mark_the_highest(tmp_path: Path, monkeypatch) -> None:
    folders = [a_run(tmp_path, name="one-00000000")]
    monkeypatch.setitem(COUNTS, "model", [4] * 6)
    folders.append(a_run(tmp_path / "other", name="two-00000000"))
    found = metrics(entries_of(folders))
    assert found["evaluate: pass@1"] == [pytest.approx(14 / 24), 1.0]
    assert best("evaluate: pass@4", found["evaluate: pass@4"]) == 1.0
    assert set(found) == {
        f"evaluate: {name}" for name in ("perplexity", "kv_bytes_per_token_measured", "pass@1", "pass@4")
    }


def test_the_estimate_is_compared_with_answers_counted(tmp_path: Path) -> None:
    found = [one for one in estimates(read_run(a_run(tmp_path))) if one.quantity == "tokens processed"]
    assert [one.measured for one in found] == [20480 * 2 + 2 * 480]


def test_the_card_has_pass_at_1(tmp_path: Path) -> None:
    run = read_run(a_run(tmp_path))
    stage = run.stage("train")
    text = render(card.model_card(run, stage, "model"))
    assert "pass@1 (95 %)" in text and "0.5833 (" in text and "0.1250 (" in text
