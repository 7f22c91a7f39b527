"""Preference pairs and prompts with completions in files of the user's own."""

from __future__ import annotations

import pytest
from test_data_stage import OPTIONS, STAGE, jsonl, run

from posttrain.data.config import DataSourceConfig
from posttrain.data.documents import Document, kinds
from posttrain.data.pairs import UnusableAnswers, normal_answers
from posttrain.errors import RecipeError

USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)
TURNS = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(
    "row",
    [
        TURNS,
        {"prompt": "q", "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "y", "rejected": "n"},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "q", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "y"}], "rejected": [USER, NO]},
    ],
)
def test_every_form_of_a_pair_has_one_normal_form(row) -> None:
    assert normal_answers(row) == TURNS


def test_strings_stay_strings_and_longer_conversations_keep_their_turns() -> None:
    strings = {"prompt": "q", "chosen": "y", "rejected": "n"}
    assert normal_answers({**strings, "other": 1}) == strings
    assert normal_answers({"prompt": "q", "completion": "y"}) == {"prompt": "q", "completion": "y"}
    assert normal_answers({"prompt": [USER], "completion": "y"}) == {"prompt": [USER], "completion": [YES]}
    long = {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]}
    assert normal_answers(long) == {"prompt": [USER, YES, USER], "chosen": [YES], "rejected": [NO]}
    early = {"chosen": [USER, YES, USER, YES], "rejected": [USER, NO, USER, YES]}
    assert normal_answers(early)["prompt"] == [USER] and len(normal_answers(early)["rejected"]) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "y"}, "no `rejected` .*it has: prompt, chosen"),
        ({"rejected": "n"}, "no `chosen`"),
        ({"chosen": "y", "rejected": "n"}, "no `prompt`, and its two sides"),
        ({"chosen": [YES], "rejected": [NO]}, "no `prompt`, and its two sides"),
        ({"prompt": "", "chosen": "y", "rejected": "n"}, "prompt is empty"),
        ({"prompt": "q", "chosen": 3, "rejected": "n"}, "`chosen` must be a text, or turns"),
        ({"prompt": "q", "completion": None}, "no `completion`"),
    ],
)
def test_what_a_row_lacks_is_said(row, message) -> None:
    with pytest.raises(UnusableAnswers, match=message):
        normal_answers(row)


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"question {n // 2}", "chosen": f"yes {n}", "rejected": "no", "more": n} for n in range(count)]


@pytest.mark.parametrize(
    ("rows", "kind", "fields"),
    [
        (pairs(40), "preference", {"prompt", "chosen", "rejected"}),
        ([{"prompt": f"q{n} ", "completion": f"a{n}"} for n in range(40)], "prompt", {"prompt", "completion"}),
    ],
)
def test_files_of_rows_are_split_and_keep_their_fields(tmp_path, rows, kind, fields) -> None:
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows)), heldout_fraction=0.3)
    predicted = STAGE.describe(cfg, {})
    train, heldout = run(cfg, tmp_path / "work")
    assert len(train) + len(heldout) == 40 and heldout
    assert all(set(row) == {"id", "text", *fields} for row in [*train, *heldout])
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in heldout)
    by_id = {f"x.jsonl:{n + 1}": row for n, row in enumerate(rows)}
    assert all(row[name] == by_id[row["id"]][name] for row in train for name in fields)
    for name in ("train", "heldout"):
        measured = STAGE.measure(name, tmp_path / "work" / "outputs" / name, predicted[name])
        assert measured.extra["rows"] == predicted[name].extra["rows"] == kind
    again = run(DataSourceConfig(path=str(tmp_path / "work/outputs/train/rows.jsonl")), tmp_path / "again")
    assert sorted(row["id"] for part in again for row in part) == sorted(row["id"] for row in train)
    assert all(row in train for part in again for row in part)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "y"}, "no `rejected`"),
        ({"prompt": "q"}, "its fields: prompt"),
        ({"prompt": 3, "completion": "a"}, "`prompt` must be a text"),
    ],
)
def test_a_row_that_lacks_a_field_stops_the_plan_at_its_line(tmp_path, row, message) -> None:
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", [*pairs(2), row])))
    with pytest.raises(RecipeError, match=message) as error:
        STAGE.check(cfg, {})
    problem = error.value.problems[0]
    assert problem.where.endswith("x.jsonl:3") and '"chosen": ...' in problem.fix


def test_a_text_of_its_own_still_counts(tmp_path) -> None:
    rows = [{**row, "text": f"rendered {n}"} for n, row in enumerate(pairs(4))]
    train, heldout = run(DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows))), tmp_path / "work")
    assert all(set(row) == {"id", "text"} for row in [*train, *heldout])


def test_kinds_of_rows(tmp_path) -> None:
    assert kinds([Document("a", "x"), Document("b", "x", messages=(("user", "x"),))]) == "messages+text"
    assert STAGE.describe(DataSourceConfig(**OPTIONS["tiny"]), {})["train"].extra["rows"] == "messages+text"
    texts = jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": "b"}])
    assert STAGE.describe(DataSourceConfig(path=str(texts)), {})["train"].extra["rows"] == "text"
    assert "rows" not in STAGE.describe(DataSourceConfig(**OPTIONS["fineweb_edu"]), {})["train"].extra
