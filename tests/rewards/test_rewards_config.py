"""Settings of rewards: what is refused, and what decides a score."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from posttrain.errors import RecipeError
from posttrain.rewards.config import AnswerFormat, GymReward, LengthReward, PoolSettings, RegexReward, RewardSettings
from posttrain.rewards.score import check_rows, identity

ANY = TypeAdapter(RewardSettings)


def test_the_type_decides_and_slips_are_refused() -> None:
    made = {name: ANY.validate_python({"type": name, **more}) for name, more in SMALLEST.items()}
    assert {name: type(reward).__name__ for name, reward in made.items()} == {
        name: f"{name.capitalize()}Reward" for name in SMALLEST
    }
    assert {name for name, reward in made.items() if reward.correctness} == {"gym", "math", "code", "plugin"}
    assert {name: reward.needs for name, reward in made.items() if reward.needs} == {
        "gym": ("task",),
        "math": ("answer",),
        "code": ("tests", "test_code"),
    }
    assert all(reward.weight == 1.0 for reward in made.values())
    with pytest.raises(ValidationError, match="wieght"):
        ANY.validate_python({"type": "gym", "wieght": 2})
    with pytest.raises(ValidationError, match="frozen"):
        made["gym"].weight = 2.0
    for reward in map(type, made.values()):
        assert all(field.description for name, field in reward.model_fields.items() if name != "type"), reward


SMALLEST = {
    "gym": {},
    "math": {},
    "code": {},
    "regex": {"pattern": "x"},
    "length": {"target": 3, "limit": 5},
    "plugin": {"name": "own"},
}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"find": "regex"}, "needs a `pattern`"),
        ({"find": "tag", "pattern": "(x)"}, "only it takes one"),
        ({"find": "regex", "pattern": "(x"}, "no regular expression"),
        ({"find": "regex", "pattern": "(x)(y)"}, "one group, and has 2"),
        ({"find": "regex", "pattern": "x"}, "one group, and has 0"),
        ({"tag": "a b"}, "tag"),
        ({"tag": "1"}, "tag"),
    ],
)
def test_answer_formats_that_cannot_work(fields, words) -> None:
    with pytest.raises(ValidationError, match=words):
        AnswerFormat(**fields)


def test_rewards_that_cannot_work() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        RegexReward(pattern="(")
    with pytest.raises(ValidationError, match="must be above"):
        LengthReward(target=5, limit=5)
    for wrong in ({"threshold": 0.0}, {"threshold": 1.1}, {"seconds": 0}, {"weight": float("nan")}):
        with pytest.raises(ValidationError):
            GymReward(**wrong)
    assert GymReward(threshold=None).threshold is None


def test_workers_do_not_decide_a_score_and_memory_does() -> None:
    assert PoolSettings(workers=3).key_fields() == PoolSettings(workers=9).key_fields() == {"memory_mb": 4096}


def test_rows_without_what_a_reward_needs_are_refused_before_anything_runs() -> None:
    rewards = {name: ANY.validate_python({"type": name, **more}) for name, more in SMALLEST.items()}
    check_rows(rewards, {"task", "answer", "test_code", "messages"})
    with pytest.raises(RecipeError) as caught:
        check_rows(rewards, {"messages", "answer"}, "stages.train.rewards")
    said = str(caught.value)
    assert "stages.train.rewards.gym" in said and "`tests` or `test_code`" in said and "answer, messages" in said
    assert "rewards.math" not in said
    with pytest.raises(RecipeError, match="no reward"):
        check_rows({}, {"task"})


def test_versions_enter_the_key() -> None:
    assert set(identity(GymReward())) == {"reasoning_gym"}
    assert set(identity(ANY.validate_python({"type": "math"}))) == {"math-verify", "latex2sympy2_extended", "sympy"}
    assert identity(LengthReward(target=1, limit=2)) == {}
    with pytest.raises(RecipeError, match="there is no reward `own`"):
        identity(ANY.validate_python({"type": "plugin", "name": "own"}))
