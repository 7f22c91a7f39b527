"""Rows of a dataset artifact as prompts: which are taken, which are left out and counted, and their tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.chat import TEMPLATE_DATE, continued_text
from posttrain.errors import StageError
from posttrain.models.tiny import tiny_tokenizer
from posttrain.policy.data import PROMPT, ROW, read_prompts
from posttrain.rewards.config import CodeReward, GymReward, LengthReward, MathReward

CORRECT = {"correct": GymReward(), "short": LengthReward(target=1, limit=2)}


def question(number: int, content: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "messages": [{"role": "user", "content": content or f"What is {number}?"}],
        "task": {"name": "chain_sum", "seed": number, "index": 0, "difficulty": 0},
        **more,
    }


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_prompts_are_what_evaluation_continues(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    rows = [question(1), question(2, "Wie groß ist π?", answer="3")]
    found = read_prompts(write(tmp_path / "data", rows), tokenizer, 200, CORRECT)
    assert found.rows.column_names == [PROMPT, ROW] and not found.unusable
    assert [json.loads(row) for row in found.rows[ROW]] == rows
    for row, prompt in zip(rows, found.rows[PROMPT], strict=True):
        text, special = continued_text(row["messages"], tokenizer, date_string=TEMPLATE_DATE)
        assert prompt == text and found.ids[prompt] == tokenizer(text, add_special_tokens=special)["input_ids"]
        assert prompt.endswith("<|im_start|>assistant\n")
    assert found.longest == max(len(ids) for ids in found.ids.values())


def test_an_answer_at_the_end_is_not_shown(tmp_path: Path) -> None:
    taught = question(1)
    taught["messages"] = [*taught["messages"], {"role": "assistant", "content": "SECRET"}]
    found = read_prompts(write(tmp_path / "data", [taught]), tiny_tokenizer(), 200, CORRECT)
    assert "SECRET" not in found.rows[PROMPT][0] and "What is 1?" in found.rows[PROMPT][0]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    without = [{"id": str(number), "messages": question(number)["messages"]} for number in (7, 8)]
    folder = write(tmp_path / "data", [question(1), question(2, "long " * 60), *without])
    found = read_prompts(folder, tiny_tokenizer(), 100, CORRECT)
    assert len(found.rows) == len(found.ids) == 1
    assert found.unusable == {"longer than max_prompt_length=100": 1, "no task, which the rewards need": 2}
    assert "2 rows of" in caplog.text and "left out: no task, which the rewards need" in caplog.text


def test_the_limit_is_inclusive(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", [question(1)])
    length = read_prompts(folder, tiny_tokenizer(), 500, CORRECT).longest
    assert read_prompts(folder, tiny_tokenizer(), length, CORRECT).longest == length
    with pytest.raises(StageError, match="longer than max_prompt_length"):
        read_prompts(folder, tiny_tokenizer(), length - 1, CORRECT)


def test_one_reward_that_can_judge_is_enough(tmp_path: Path) -> None:
    rows = [question(1), {**question(2), "task": None, "answer": "2"}, {**question(3), "task": None}]
    folder = write(tmp_path / "data", rows)
    found = read_prompts(folder, tiny_tokenizer(), 200, {"gym": GymReward(), "math": MathReward()})
    assert len(found.rows) == 2
    assert found.unusable == {"no answer or task, which the rewards need": 1}


def test_a_reward_needs_one_of_its_fields(tmp_path: Path) -> None:
    rows = [question(1, tests=["assert True"]), question(2, test_code="assert True"), question(3)]
    found = read_prompts(write(tmp_path / "data", rows), tiny_tokenizer(), 200, {"code": CodeReward()})
    assert len(found.rows) == 2 and found.unusable == {"no test_code or tests, which the rewards need": 1}


def test_rewards_that_need_nothing_take_every_row(tmp_path: Path) -> None:
    """Only where none judges correctness: else a row that it cannot judge would be learnt for its form."""
    folder = write(tmp_path / "data", [{**question(1), "task": None}])
    shaping = {"short": LengthReward(target=1, limit=2)}
    assert len(read_prompts(folder, tiny_tokenizer(), 200, shaping).rows) == 1
    with pytest.raises(StageError):
        read_prompts(folder, tiny_tokenizer(), 200, CORRECT)


@pytest.mark.parametrize(
    ("rows", "limit", "said", "fix"),
    [
        ([question(1), question(2)], 5, "no prompts: 2 rows: longer than max_prompt_length=5", "larger max_prompt"),
        ([{**question(1), "task": None}], 200, "1 rows: no task, which the rewards need", "data=reasoning_gym_rl"),
        ([], 200, "the dataset has no rows", "data=reasoning_gym_rl"),
    ],
)
def test_nothing_to_ask_is_an_error(
    rows: list[dict[str, Any]], limit: int, said: str, fix: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError) as error:
        read_prompts(write(tmp_path / "data", rows), tiny_tokenizer(), limit, CORRECT)
    (problem,) = error.value.problems
    assert said in problem.what and fix in problem.fix and problem.where == str(tmp_path / "data")
