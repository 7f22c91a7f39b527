"""Sets of rewards: scores, what cannot be scored, and what is counted."""

from __future__ import annotations

import re
import sys
import time

import pytest
from plugin_packages import forget, install, see

from posttrain.config import plugins
from posttrain.data.sections import EASY_TASKS, GymTasks
from posttrain.data.tasks import draw
from posttrain.errors import RecipeError, StageError
from posttrain.rewards import gym
from posttrain.rewards.config import (
    AnswerFormat,
    CodeReward,
    GymReward,
    LengthReward,
    MathReward,
    PluginReward,
    RegexReward,
)
from posttrain.rewards.score import COUNTS, RewardSet, Scores
from posttrain.rewards.text import length_score

SUM = {
    "name": "chain_sum",
    "settings": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "seed": 5,
    "size": 3,
    "index": 1,
}
PLUGIN = """
import os
import time

def near(prompts, completions, rows):
    assert len(prompts) == 1
    if completions[0] == "hang":
        time.sleep(600)
    if completions[0] == "raise":
        raise KeyError("x")
    if completions[0] == "key":
        return [float(os.environ["OWN_KEY"])]
    if completions[0] == "short":
        return []
    return [None if completions[0] == "?" else float(prompts[0] + completions[0] == rows[0]["answer"])]
"""


def scored(rewards, completions, rows, find: str = "tag", **fields) -> Scores:
    size = len(completions)
    with RewardSet(rewards, AnswerFormat(find=find, **fields), where="stages.train.rewards") as scorer:
        return scorer.score(["4"] * size, completions, rows, list(range(size)))


def counted(scores: Scores) -> dict[str, int]:
    assert set(scores.counts) == set(COUNTS)
    return {name: count for name, count in scores.counts.items() if count}


def test_gym_scores_are_the_tasks_own_with_and_without_a_threshold() -> None:
    right = gym.generator_of(SUM)[1]["answer"]
    completions = [f"<answer>{text}</answer>" for text in (right, f"it is {right}", "wrong")] + ["no tag", right]
    rewards = {"strict": GymReward(), "own": GymReward(threshold=None), "half": GymReward(threshold=0.2)}
    scores = scored(rewards, completions, [{"task": SUM}] * 5)
    assert scores.by_reward["strict"] == [1.0, 0.0, 0.0, 0.0, 0.0]
    partial = len(right) / len(f"it is {right}")
    assert scores.by_reward["own"] == [1.0, pytest.approx(partial), 0.0, 0.0, 0.0]
    assert scores.by_reward["half"][1] == float(partial >= 0.2)
    assert counted(scores) == {"parse_failures": 2}


def test_a_row_that_cannot_be_scored_is_none_and_never_wrong() -> None:
    rows = [{"task": SUM}, {"task": {**SUM, "name": "no_such_task"}}, {"task": None}, {}]
    scores = scored(
        {"correct": GymReward(), "short": LengthReward(target=1, limit=3)}, ["<answer>x</answer>"] * 4, rows
    )
    assert scores.by_reward == {"correct": [0.0, None, None, None], "short": [0.0, 0.0, -0.5, -1.0]}
    assert counted(scores) == {"gold_failures": 1, "unscored": 3}
    assert scores.total({"correct": 1.0, "short": 0.5}) == [0.0, None, None, None]
    assert scores.total({"short": 2.0}, only={"short"}) == [0.0, 0.0, -1.0, -2.0]


def test_totals() -> None:
    scores = Scores({"a": [1.0, None, None], "b": [0.0, 1.0, None], "c": [-1.0, -1.0, -1.0]}, {}, frozenset("ab"))
    assert scores.total({"a": 2.0, "b": 1.0, "c": 0.5}) == [1.5, 0.5, None]
    assert Scores({}, {}).total({}) == []
    with pytest.raises(KeyError):
        scores.total({"a": 1.0})


def test_a_score_that_is_no_number_is_an_error() -> None:
    class Bad:
        def score_answer(self, answer, entry):
            return float("nan")

    with pytest.raises(ValueError, match="nan"):
        gym.own_score(Bad(), "1", {})


def test_text_rewards() -> None:
    rewards = {
        "whole": RegexReward(pattern=r"<a>\d+</a>"),
        "some": RegexReward(pattern=r"\d\d", match="search"),
        "slow": RegexReward(pattern=r"(a+)+$", seconds=0.3),
    }
    completions = ["<a>12</a>", "<a>12</a> ", "a" * 40 + "b"]
    scores = scored(rewards, completions, [{}] * 3)
    assert scores.by_reward == {"whole": [1.0, 0.0, 0.0], "some": [1.0, 1.0, 0.0], "slow": [0.0, 0.0, 0.0]}
    # No correctness reward looks for an answer: none is missing.
    assert counted(scores) == {"timeouts": 1}
    assert [length_score(length, 10, 20) for length in (0, 10, 15, 20, 99)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_a_users_pattern_that_never_ends_is_a_parse_failure() -> None:
    pattern = r"((?:a+)+)$"
    began = time.monotonic()
    scores = scored(
        {"correct": MathReward()}, ["a" * 40 + "b", "aaa"], [{"answer": "aaa"}] * 2, "regex", pattern=pattern
    )
    assert time.monotonic() - began < 60
    assert scores.by_reward["correct"][0] == 0.0 and scores.counts["timeouts"] == 1
    assert scores.counts["parse_failures"] >= 1
    hashes = scored({"correct": MathReward()}, ["so #### 4", "4"], [{"answer": "4"}] * 2, "regex", pattern="#### (.*)")
    assert hashes.by_reward["correct"] == [1.0, 0.0] and counted(hashes) == {"parse_failures": 1}


@pytest.fixture
def package(tmp_path, monkeypatch):
    points = {"rewards:near": "own_rewards:near"}
    see(monkeypatch, install(tmp_path / "site", "posttrain-own", points, {"own_rewards.py": PLUGIN}))
    yield
    sys.modules.pop("own_rewards", None)
    plugins._loaded.clear()
    forget()


def test_a_reward_of_an_installed_package_is_called_one_by_one(package, monkeypatch) -> None:
    monkeypatch.setenv("OWN_KEY", "0.25")  # unlike an answer's scorer, a package may need it
    rewards = {"own": PluginReward(name="near", seconds=0.5)}
    completions = ["2", "3", "?", "hang", "raise", "2", "key"]
    scores = scored(rewards, completions, [{"answer": "42"}] * 7)
    assert scores.by_reward["own"] == [1.0, 0.0, None, 0.0, 0.0, 1.0, 0.25]
    assert counted(scores) == {"timeouts": 1, "errors": 1, "unscored": 1}
    assert plugins.in_use() == {"posttrain-own": "1.2"}


def test_a_package_that_breaks_its_promise_stops_and_a_missing_one_is_told_at_once(package) -> None:
    with pytest.raises(StageError, match="0 scores for 1 answers") as caught:
        scored({"own": PluginReward(name="near")}, ["2", "short"], [{"answer": "42"}] * 2)
    assert "stages.train.rewards.own" in str(caught.value)
    with pytest.raises(RecipeError, match="there is no reward `naer`"):
        RewardSet({"own": PluginReward(name="naer")}, AnswerFormat())


def test_several_rewards_at_once_keep_their_places() -> None:
    tests = [{"input": "", "output": "4"}]
    rows = [{"answer": "4", "tests": tests}, {"answer": "5", "tests": tests}, {"tests": tests}, {"answer": "4"}]
    scores = scored({"math": MathReward(), "code": CodeReward()}, ["4", "print(4)", "print(4)", "4"], rows, "whole")
    assert scores.by_reward == {"math": [1.0, 0.0, None, 1.0], "code": [0.0, 1.0, 1.0, None]}
    assert scores.total({"math": 1.0, "code": 1.0}) == [1.0, 1.0, 1.0, 1.0]


def test_a_thousand_gym_scores_take_less_than_half_a_second() -> None:
    problems = draw(GymTasks(size=1024), 0.0, 0).train
    assert {problem.task["name"] for problem in problems} == set(EASY_TASKS)
    columns = (
        [problem.question for problem in problems],
        [f"<answer>{problem.answer}</answer>" for problem in problems],
        [{"task": problem.task} for problem in problems],
        [5] * len(problems),
    )
    with RewardSet({"correct": GymReward()}, AnswerFormat()) as scorer:
        scorer.warm()
        took = []
        for _ in range(4):
            began = time.perf_counter()
            scores = scorer.score(*columns)
            took.append(time.perf_counter() - began)
    assert scores.by_reward["correct"] == [1.0] * 1024 and not counted(scores)
    assert min(took) < 0.5


def test_columns_of_different_lengths_are_refused() -> None:
    with RewardSet({"a": LengthReward(target=1, limit=2)}, AnswerFormat()) as scorer:
        with pytest.raises(ValueError, match=re.escape("1 prompts, 2 completions, 2 rows, 2 lengths")):
            scorer.score(["x"], ["a", "b"], [{}] * 2, [1, 2])
        scorer.warm()
        assert not scorer._pool._workers  # nothing here needs a process
