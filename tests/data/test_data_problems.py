"""Problems to be rewarded on: answer formats, levels of difficulty, right answers of hub data sets and of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from posttrain.data import problems, tasks
from posttrain.data.builders import hub
from posttrain.data.builders.reasoning_gym import INSTRUCTION
from posttrain.data.config import DataSourceConfig
from posttrain.data.difficulty import level_settings, top_level
from posttrain.data.reading import read_card, read_rows
from posttrain.data.sections import GymTasks, HubData
from posttrain.data.stage import DataSource
from posttrain.data.tasks import HELDOUT_SEEDS, SEEDS_PER_RUN, draw, problem_of
from posttrain.errors import RecipeError, StageError
from posttrain.paths import shipped
from posttrain.pipeline.context import StageContext
from posttrain.rewards.config import AnswerFormat
from posttrain.rewards.extraction import find_answer
from posttrain.rewards.gym import score

STAGE = DataSource()
SUMS = {"chain_sum": {"min_digits": 1, "max_digits": 2}}


def gym(**fields) -> DataSourceConfig:
    return DataSourceConfig(builder="reasoning_gym", gym={"size": 40, **fields}, heldout_fraction=0.25)


def run(cfg: DataSourceConfig, work: Path, seed: int = 0) -> tuple[list[dict], list[dict], StageContext]:
    work.mkdir(parents=True, exist_ok=True)
    ctx = StageContext("data", cfg, work, seed=seed)
    outputs = STAGE.run(ctx)
    return read_rows(outputs["train"]), read_rows(outputs["heldout"]), ctx


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def option(name: str, **hub_fields) -> DataSourceConfig:
    body = yaml.safe_load((shipped("conf") / "data" / f"{name}.yaml").read_text())
    if hub_fields:
        body["hub"] |= hub_fields
    return DataSourceConfig(**body)


def test_tagged_answers_are_asked_for_and_scored(tmp_path) -> None:
    cfg = gym(tasks=SUMS, answer_format="tag")
    train, heldout, _ = run(cfg, tmp_path / "w")
    assert (len(train), len(heldout)) == (30, 10)
    for row in [*train, *heldout]:
        entry = problem_of(row["task"])
        user, assistant = row["messages"]
        assert user == {"role": "user", "content": f"{entry['question'].strip()}\n\n{INSTRUCTION}"}
        assert assistant == {"role": "assistant", "content": f"<answer>{entry['answer']}</answer>"}
        assert row["answer"] == entry["answer"] and row["text"].endswith("</answer>")
        assert score(find_answer(assistant["content"], AnswerFormat()), row["task"], 1.0) == (1.0, "")
    predicted = STAGE.describe(cfg, {})["train"]
    measured = STAGE.measure("train", tmp_path / "w" / "outputs" / "train", predicted)
    assert predicted.extra["fields"] == measured.extra["fields"] == ["answer", "task"]
    assert predicted.tokens == pytest.approx(measured.tokens, rel=0.1)
    assert read_card(tmp_path / "w" / "outputs" / "train")["fields"] == ["answer", "task"]


def test_an_instruction_of_ones_own(tmp_path) -> None:
    for form in ("tag", "plain"):
        row = run(gym(tasks=SUMS, answer_format=form, instruction="Be brief."), tmp_path / form)[0][0]
        assert row["messages"][0]["content"].endswith("\n\nBe brief.") and INSTRUCTION not in row["text"]
        assert ("<answer>" in row["messages"][1]["content"]) == ("answer" in row) == (form == "tag")


def test_defaults_give_the_key_and_the_rows_that_they_gave(tmp_path) -> None:
    fields = gym(tasks=SUMS).key_fields()["gym"]
    assert set(fields) == {"tasks", "size"}
    for later in ({"answer_format": "tag"}, {"instruction": "x"}, {"difficulty": [0]}):
        found = gym(tasks=SUMS, **later).key_fields()["gym"]
        assert set(found) - set(fields) == set(later)
        json.dumps(found)
    row = run(gym(tasks=SUMS), tmp_path)[0][0]
    assert list(row) == ["id", "text", "messages", "task"]
    assert list(row["task"]) == ["name", "settings", "seed", "size", "index"] and row["id"].startswith("chain_sum/")


def test_hub_settings_at_their_defaults_are_not_in_the_key() -> None:
    plain = DataSourceConfig(builder="hub", hub={"name": "a/b"}).key_fields()["hub"]
    assert set(plain) == {"name", "config", "split", "revision", "max_rows", "licence"}
    asked = DataSourceConfig(builder="hub", hub={"name": "a/b", "answer_field": "x"}).key_fields()["hub"]
    assert asked["answer_field"] == "x" and "question_field" not in asked


def test_levels_are_those_of_the_curriculum_and_own_settings_win() -> None:
    cfg = GymTasks(tasks=SUMS, size=60, difficulty=[0, 2])
    drawn = draw(cfg, 0.2, seed=3)
    found = [*drawn.train, *drawn.heldout]
    by_level = {level: [p for p in found if p.task["difficulty"] == level] for level in (0, 2)}
    assert sorted(map(len, by_level.values()))[0] >= 25
    for level, most in ((0, 2), (2, 4)):
        settings = by_level[level][0].task["settings"]
        assert settings == {"min_terms": 2, "max_terms": most, "min_digits": 1, "max_digits": 2}
    assert max(p.question.count("+") + p.question.count("-") for p in by_level[0]) == 1
    assert max(p.question.count("+") + p.question.count("-") for p in by_level[2]) == 3
    assert {p.id.partition("/")[0] for p in found} == {"chain_sum@0", "chain_sum@2"}
    assert len({p.id for p in found}) == len({p.question for p in found}) == len(found) == 60
    for part, first in ((drawn.train, 0), (drawn.heldout, HELDOUT_SEEDS)):
        seeds = [p.task["seed"] + p.task["index"] - 3 * SEEDS_PER_RUN for p in part]
        assert min(seeds) >= first and max(seeds) < first + HELDOUT_SEEDS
    assert all(problem_of(p.task)["answer"] == p.answer for p in found)


def test_an_attribute_with_fewer_levels_stays_at_its_last() -> None:
    assert top_level("chain_sum") == 10
    assert level_settings("chain_sum", 10) == {"min_terms": 2, "max_terms": 12, "min_digits": 1, "max_digits": 10}


def test_one_level_may_be_a_number() -> None:
    assert GymTasks(difficulty=1).difficulty == GymTasks(difficulty=[1]).difficulty == (1,)
    for wrong in ([], [1, 1], [-1], -1, "hard"):
        with pytest.raises(ValidationError):
            GymTasks(difficulty=wrong)


@pytest.mark.parametrize(
    ("tasks_", "difficulty", "message", "fix"),
    [
        ({"chain_sum": {}}, [0, 11], "task chain_sum has no level 11", "its levels are 0 to 10"),
        ({"acre": {}, "gcd": {}}, 0, "task acre has no curriculum", "tasks with levels are e.g. gcd"),
        ({"chain_sums": {}}, 0, "no task 'chain_sums'", "chain_sum"),
        ({"products": {"min_terms": 5}}, 0, "refuses its settings at level 0: max_terms", "min_digits"),
        (
            {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}},
            [0, 1],
            "is the same at levels 0 and 1",
            "leave a setting to the level",
        ),
    ],
)
def test_levels_that_are_not_there_stop_the_plan(tasks_, difficulty, message, fix) -> None:
    for ask in (STAGE.describe, STAGE.check):
        with pytest.raises(RecipeError) as error:
            ask(gym(tasks=tasks_, difficulty=difficulty), {})
        assert message in str(error.value) and fix in str(error.value)


def test_easy_tasks_with_levels_are_checked_too() -> None:
    with pytest.raises(RecipeError, match="no level 99"):
        STAGE.check(gym(difficulty=99), {})
    sizes = [tasks.typical_bytes(GymTasks(tasks=SUMS, difficulty=level)) for level in (0, 10)]
    assert sizes[1] > sizes[0] + 10


def test_pairs_are_plain() -> None:
    for later in ({"answer_format": "tag"}, {"instruction": "x"}):
        with pytest.raises(ValidationError, match="pairs are plain"):
            DataSourceConfig(builder="preference_pairs", gym=later)


def test_the_option_for_rewards_has_every_task_at_every_level(tmp_path) -> None:
    cfg = option("reasoning_gym_rl")
    assert cfg.gym.answer_format == "tag" and cfg.gym.size == 6000
    problems_ = draw(cfg.gym, cfg.heldout_fraction, seed=0)
    assert (len(problems_.train), len(problems_.heldout)) == (5400, 600)
    for part in (problems_.train, problems_.heldout):
        levels = {(p.task["name"], p.task["difficulty"]) for p in part}
        assert len(levels) == 9
        assert len({p.question for p in part}) == len(part)
    assert not {p.question for p in problems_.train} & {p.question for p in problems_.heldout}


GSM = {"question": " How many clips? ", "answer": "48/2 = 24.\n48+24 = 72.\n#### 72"}
MATH = {"problem": "Half?", "solution": "We get $\\boxed{\\frac{1}{2}}$, so {half}.", "level": "Level 1"}
DAPO = {"prompt": [{"role": "user", "content": "Solve."}], "reward_model": {"ground_truth": "34", "style": "rule"}}
AS_MATH = {
    "question_field": "problem",
    "answer_field": "solution",
    "solution_field": "solution",
    "answer_pattern": "boxed",
}
AS_DAPO = {
    "question_field": "prompt",
    "answer_field": "reward_model.ground_truth",
    "solution_field": None,
    "answer_pattern": None,
    "instruction": None,
    "answer_text": "Answer: {answer}",
}
ASKS = "Think step by step, and write your final answer as \\boxed{answer}."


@pytest.mark.parametrize(
    ("row", "fields", "question", "answered", "answer"),
    [
        (GSM, {}, f"How many clips?\n\n{ASKS}", "48/2 = 24.\n48+24 = 72.\n\\boxed{72}", "72"),
        (MATH, AS_MATH, f"Half?\n\n{ASKS}", MATH["solution"], "\\frac{1}{2}"),
        (DAPO, AS_DAPO, "Solve.", "Answer: 34", "34"),
        (DAPO, {**AS_DAPO, "answer_text": "\\boxed{{answer}}"}, "Solve.", "\\boxed{34}", "34"),
        ({**DAPO, "reward_model": {"ground_truth": 7}}, AS_DAPO, "Solve.", "Answer: 7", "7"),
        ({"reward_model.ground_truth": "1", "prompt": "P"}, AS_DAPO, "P", "Answer: 1", "1"),
    ],
)
def test_rows_of_the_hub_become_problems(monkeypatch, tmp_path, row, fields, question, answered, answer) -> None:
    others = [{**row, "question": f"{n}?", "problem": f"{n}?", "prompt": f"{n}?"} for n in range(9)]
    monkeypatch.setattr(hub, "_stream", lambda cfg: iter([row, *others]))
    train, heldout, _ = run(option("math", **fields), tmp_path)
    first = next(found for found in train + heldout if found["messages"][0]["content"] == question)
    assert first["messages"][1] == {"role": "assistant", "content": answered}
    assert first["answer"] == answer and list(first) == ["id", "text", "messages", "answer"]
    assert len(train) + len(heldout) == 10


def test_hub_rows_without_an_answer_or_asked_before_are_left_out(monkeypatch, tmp_path) -> None:
    rows = [{"question": f"{n % 6}?", "answer": f"so\n#### {n}" if n != 3 else "none"} for n in range(12)]
    monkeypatch.setattr(hub, "_stream", lambda cfg: iter(rows))
    train, heldout, ctx = run(option("math"), tmp_path / "a")
    assert sorted(found["answer"] for found in train + heldout) == ["0", "1", "2", "4", "5", "9"]
    assert {"unanswered": 1, "duplicates": 5}.items() <= ctx.result.items()
    monkeypatch.setattr(hub, "_stream", lambda cfg: iter([{"question": "q", "answer": "x"}] * 3))
    with pytest.raises(StageError, match=r"none of 3 rows of openai/gsm8k has an answer in 'answer' that matches"):
        run(option("math"), tmp_path / "b")
    monkeypatch.setattr(hub, "_stream", lambda cfg: iter([{"text": "q", "answer": "#### 1"}] * 3))
    with pytest.raises(StageError, match=r"no question in 'question' \(its fields: answer, text\)"):
        run(option("math"), tmp_path / "c")


def test_conversations_of_the_hub_keep_the_answer_that_is_named(monkeypatch, tmp_path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so it is 4"}]
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, turns[1]], "answer": "4", "gold": n} for n in range(8)]
    monkeypatch.setattr(hub, "_stream", lambda cfg: iter(rows))
    named = DataSourceConfig(builder="hub", hub={"name": "a/b", "answer_field": "gold"})
    train, heldout, _ = run(named, tmp_path / "a")
    assert {row["answer"] for row in train + heldout} == {str(n) for n in range(8)}
    assert STAGE.describe(named, {})["train"].extra["fields"] == ["answer"]
    old = DataSourceConfig(builder="hub", hub={"name": "a/b"})
    train, heldout, _ = run(old, tmp_path / "b")
    assert not any("answer" in row for row in train + heldout)  # as when its key was first given
    assert "fields" not in STAGE.describe(old, {})["train"].extra


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question_field": "q"}, "need an `answer_field`"),
        ({"answer_pattern": "(x)"}, "need an `answer_field`"),
        ({"answer_field": "a", "instruction": "x"}, "need a `question_field`"),
        ({"answer_field": "a", "solution_field": "x"}, "need a `question_field`"),
        ({"answer_field": "a", "answer_pattern": "x"}, "must have one group"),
        ({"answer_field": "a", "answer_pattern": "(x"}, "is no regular expression"),
        ({"answer_field": "a", "answer_text": "x"}, "must contain {answer}"),
    ],
)
def test_hub_settings_that_do_not_fit(fields, message) -> None:
    with pytest.raises(ValidationError) as error:
        HubData(name="a/b", **fields)
    assert message in str(error.value)


def test_files_keep_what_rewards_read(tmp_path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tests = [{"input": "1", "output": "2"}]
    rows = [
        {"id": "chat", "messages": turns, "answer": 4, "tests": tests, "test_code": "assert 1", "level": 3},
        {"id": "pair", "prompt": "p", "completion": " c", "answer": "5"},
        {"id": "asked", "question": "what?", "answer": "6", "tests": "no list", "test_code": 7},
        {"id": "turns", "prompt": turns[:1], "answer": 0.5},
        {"id": "program", "prompt": "double it", "tests": tests},
        {"id": "text", "text": "alone", "answer": "7"},
    ]
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows)))
    train, heldout, _ = run(cfg, tmp_path / "w")
    found = {row.pop("id"): row for row in train + heldout}
    assert found["chat"] == {
        "text": "User: q\n\nAssistant: a",
        "messages": turns,
        "answer": "4",
        "tests": tests,
        "test_code": "assert 1",
    }
    assert found["pair"] == {"text": "p c", "prompt": "p", "completion": " c", "answer": "5"}
    asked = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "6"}]
    assert found["asked"] == {"text": "User: what?\n\nAssistant: 6", "messages": asked, "answer": "6"}
    assert found["turns"]["messages"][1]["content"] == found["turns"]["answer"] == "0.5"
    program = [{"role": "user", "content": "double it"}]
    assert found["program"] == {"text": "User: double it", "messages": program, "tests": tests}
    assert found["text"] == {"text": "alone"}


def test_problems_of_files_with_one_question_stay_in_one_split(tmp_path) -> None:
    rows = [{"question": f"{n // 3}?", "answer": n} for n in range(30)]
    train, heldout, _ = run(DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows))), tmp_path / "w")
    assert len(heldout) % 3 == 0 and heldout and len(train) + len(heldout) == 30


def test_a_prompt_alone_asks(tmp_path) -> None:
    """Rewards of length and form need nothing else of a row."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q2"}]
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "q1", "id": "one"}, {"prompt": turns, "source": "s"}])
    train, heldout, _ = run(DataSourceConfig(path=str(path), document_field="source"), tmp_path / "w")
    asked = [problems.prompt_of(row) for row in [*train, *heldout]]
    assert sorted(asked, key=len) == [[{"role": "user", "content": "q1"}], turns]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q"},
        {"question": "", "answer": "1"},
        {"prompt": [1], "answer": "1"},
        {"prompt": ""},
        {"prompt": "p", "complettion": "c"},
    ],
)
def test_a_row_that_asks_or_answers_nothing_is_refused(tmp_path, row) -> None:
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", [{"text": "a"}, row])))
    with pytest.raises(RecipeError, match=r'(?s)no text in field.*"question"'):
        STAGE.check(cfg, {})


def test_files_that_name_such_fields_have_a_key_of_their_own(tmp_path) -> None:
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": 'she said "answer" to it'}, {"text": "b"}])
    assert set(STAGE.external(DataSourceConfig(path=str(plain)))) == {"files"}
    asked = jsonl(tmp_path / "asked.jsonl", [{"question": "q", "answer": "1"}, {"question": "r", "answer": "1"}])
    assert STAGE.external(DataSourceConfig(path=str(asked)))["fields"] == ["answer"]
    cfg = DataSourceConfig(path=str(plain), heldout_path=str(asked))
    assert STAGE.external(cfg)["heldout_fields"] == ["answer"]
    (tmp_path / "empty.jsonl").write_text("")
    assert set(STAGE.external(DataSourceConfig(path=str(tmp_path / "empty.jsonl")))) == {"files"}


def test_planned_fields_are_those_that_every_row_has(tmp_path) -> None:
    rows = [{"question": f"{n}?", "answer": "1", **({"tests": []} if n else {})} for n in range(6)]
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows)))
    assert all(meta.extra["fields"] in (["answer"], ["answer", "tests"]) for meta in STAGE.describe(cfg, {}).values())
    assert ["answer"] in [meta.extra["fields"] for meta in STAGE.describe(cfg, {}).values()]
    assert STAGE.describe(DataSourceConfig(builder="tiny"), {})["train"].extra["fields"] == []


def test_what_a_model_continues() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert problems.prompt_of({"messages": turns}) == turns[:1]
    assert problems.prompt_of({"messages": turns[:1]}) == turns[:1]
    assert problems.prompt_of({"prompt": "p", "completion": "c"}) == "p"
    for row in ({"id": "x", "text": "t"}, {"id": "x", "messages": turns[1:]}):
        with pytest.raises(StageError, match="row 'x' asks nothing"):
            problems.prompt_of(row)


def test_right_answers_in_a_text() -> None:
    assert problems.found_answer("a #### 1\n#### 2 \nb", "#### (.*)") == ("2", "a #### 1\n\nb")
    assert problems.found_answer("\\boxed{1} or \\boxed{x{2}}", "boxed") == ("x{2}", "\\boxed{1} or \\boxed{x{2}}")
    assert problems.found_answer(" 5 ", None) == ("5", " 5 ")
    for text, pattern in (("a", "#### (.*)"), ("#### ", "#### (.*)"), ("a", "boxed"), (" ", None), ("b", "(a)?b")):
        assert problems.found_answer(text, pattern) is None
