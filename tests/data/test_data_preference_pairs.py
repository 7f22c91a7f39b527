"""Pairs of the right answer and the model's own mistake: resumable to the same bytes, and honest about the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_teacher_samples import ARCHITECTURE, stop_after

from posttrain.data.builders import preference_pairs
from posttrain.data.builders.preference_pairs import EMPTY, RIGHT, UNCLEAR, UNSCORED, WRONG, verdict
from posttrain.data.config import DataSourceConfig
from posttrain.data.reading import read_rows
from posttrain.data.stage import DataSource
from posttrain.data.tasks import draw
from posttrain.errors import RecipeError, StageError, StopRequested
from posttrain.models.inspect import model_meta
from posttrain.models.tiny import write_random_model
from posttrain.pipeline.context import InputArtifact, StageContext

STAGE = DataSource()
TASKS = {"chain_sum": {"max_terms": 2, "max_digits": 2}, "gcd": {"max_value": 30}}
PAIRS = {"max_new_tokens": 6, "batch_size": 5, "tries": 2}


def config(**fields) -> DataSourceConfig:
    given = {"builder": "preference_pairs", "inputs": {"model": "model"}, "heldout_fraction": 0.25}
    return DataSourceConfig(**{**given, "gym": {"size": 16, "tasks": TASKS}, "pairs": PAIRS, **fields})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> InputArtifact:
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, ARCHITECTURE, 0)
    return InputArtifact(folder, model_meta(folder), "model")


def context(work: Path, model: InputArtifact, seed: int = 0, **fields) -> StageContext:
    work.mkdir(exist_ok=True)
    return StageContext("data", config(**fields), work, {"model": model}, seed=seed)


def bytes_of(outputs: dict[str, Path]) -> list[bytes]:
    return [(path / "rows.jsonl").read_bytes() for path in outputs.values()]


def test_stopped_and_torn_run_ends_with_the_same_bytes(model, tmp_path) -> None:
    whole = context(tmp_path / "whole", model)
    rows = bytes_of(STAGE.run(whole))
    ctx = context(tmp_path / "stopped", model)
    stop_after(ctx, batches=2)
    with pytest.raises(StopRequested):
        STAGE.run(ctx)
    with (ctx.work_dir / "partial.jsonl").open("a") as file:
        file.write('{"batch": 2, "answ')
    (ctx.work_dir / "STOP").unlink()
    again = context(ctx.work_dir, model)
    assert bytes_of(STAGE.run(again)) == rows and again.result == whole.result
    assert rows != bytes_of(STAGE.run(context(tmp_path / "other", model, seed=1)))


def test_rows_are_pairs_in_the_form_that_trl_takes(model, tmp_path) -> None:
    from trl.data_utils import is_conversational

    ctx = context(tmp_path / "w", model)
    outputs = STAGE.run(ctx)
    train, heldout = (read_rows(outputs[name]) for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (12, 4)  # random weights are never right
    for row in [*train, *heldout]:
        assert is_conversational(row) and {"prompt", "chosen", "rejected", "task", "text", "id"} <= set(row)
        assert row["chosen"][0]["content"] == row["text"].rpartition("Assistant: ")[2] != row["rejected"][0]["content"]
        assert row["unfinished"] == ["rejected"]  # six tokens of noise do not end by themselves
    assert not {row["prompt"][0]["content"] for row in train} & {row["prompt"][0]["content"] for row in heldout}
    assert ctx.result["questions"] == 16 and ctx.result["unfinished"] == 16 and ctx.result["always_right"] == 0
    predicted = STAGE.describe(ctx.config, {"model": model.meta})["train"]
    assert predicted.extra["rows"] == STAGE.measure("train", outputs["train"], predicted).extra["rows"] == "preference"


def answering(monkeypatch, answers) -> list[list[str]]:
    """Put another writer in place of the model: `answers(question, try)`; the questions of each call."""
    calls: list[list[str]] = []
    tries: dict[str, int] = {}

    def write(model, tokenizer, prompts, samples, seed):
        calls.append(prompts)
        for prompt in prompts:
            tries[prompt] = tries.get(prompt, -1) + 1
        return [(answers(prompt, tries[prompt]), True) for prompt in prompts]

    monkeypatch.setattr(preference_pairs, "write", write)
    monkeypatch.setattr(preference_pairs, "load_writer", lambda ctx, dtype: (None, None))
    return calls


def test_right_answers_are_tried_again_and_questions_without_a_wrong_one_left_out(model, tmp_path, monkeypatch) -> None:
    drawn = draw(config().gym, 0.25, 0)
    right = {problem.question: problem.answer for problem in [*drawn.train, *drawn.heldout]}
    questions = [problem.question for problem in drawn.train]

    def answers(question: str, attempt: int) -> str:
        number = questions.index(question) if question in questions else -1
        if number == 0:
            return right[question]  # always right
        if number == 1:
            return right[question] if attempt == 0 else "wrong"  # the second try
        if number == 2:
            return f"I am sure that it is {right[question]}, for a fact"  # scores low, and is right
        if number == 3:
            return ""
        return "wrong"

    calls = answering(monkeypatch, answers)
    ctx = context(tmp_path / "w", model)
    train = read_rows(STAGE.run(ctx)["train"])
    assert [row["prompt"][0]["content"] for row in train] == [questions[1], *questions[4:]]
    assert all(row["rejected"][0]["content"] == "wrong" and "unfinished" not in row for row in train)
    assert (ctx.result["always_right"], ctx.result["never_wrong"]) == (1, 2)
    assert ctx.result["tries"] == {RIGHT: 3, WRONG: 13, UNCLEAR: 2, UNSCORED: 0, EMPTY: 2}
    assert [len(call) for call in calls] == [5, 4, 5, 5, 1]  # a second round for those without a wrong answer alone


def test_a_model_that_knows_everything_gives_no_pairs(model, tmp_path, monkeypatch) -> None:
    drawn = draw(config().gym, 0.25, 0)
    right = {problem.question: problem.answer for problem in [*drawn.train, *drawn.heldout]}
    answering(monkeypatch, lambda question, attempt: right[question])
    with pytest.raises(StageError, match=r"(?s)no training pair: .* are 32 right.*harder tasks"):
        STAGE.run(context(tmp_path / "w", model))


def test_what_an_answer_is() -> None:
    assert verdict("7", 1.0, "7", 0.5) == RIGHT and verdict("8", 0.0, "7", 0.5) == WRONG
    assert verdict("", None, "7", 0.5) == EMPTY and verdict("8", None, "7", 0.5) == UNSCORED
    for within in ("The answer is 7.", "7, I think", "it is 7"):
        assert verdict(within, 0.01, "7", 0.5) == UNCLEAR
    for other in ("17", "7.5", "-7", "70", "7,000", "x7"):
        assert verdict(other, 0.2, "7", 0.5) == WRONG
    assert verdict("it is ZAB", 0.1, "zab", 0.5) == UNCLEAR
    assert verdict("7?", 0.6, "7", 0.7) == UNCLEAR


def test_needs_a_model_and_counts_its_sampling(model) -> None:
    with pytest.raises(RecipeError, match="preference_pairs needs a model"):
        STAGE.check(config(), {})
    estimate = STAGE.estimate(config(), {"model": model.meta})
    assert estimate.tokens == 16 * 2 * 6 and estimate.memory["weights"] == 4 * estimate.parameters
    assert "left out" in estimate.notes[0]
    json.dumps(config().key_fields())
    slower = config(pairs={**PAIRS, "score_seconds": 60})
    assert slower.key_fields() == config().key_fields() != config(pairs={**PAIRS, "tries": 3}).key_fields()
