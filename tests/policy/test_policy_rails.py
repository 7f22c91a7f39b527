"""Alarms: each on its own sign, after patience, once, and the same in a resumed run; and the log of completions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import SMALL

from posttrain.methods.grpo import GrpoConfig
from posttrain.pipeline.context import StageContext
from posttrain.policy.completions import FILE, CompletionLog
from posttrain.policy.rails import PATIENCE, Rails

NAN = float("nan")

GOOD: dict[str, float] = {
    "entropy": 1.0,
    "completions/clipped_ratio": 0.5,
    "questions/zero_variance": 0.9,
    "questions/all_wrong": 0.9,
    "answers/parse_failures": 0.5,
    "rollout/logprob_gap": 0.01,
}
"""At the limits: nothing is alarming yet."""

ALARMS: dict[str, tuple[dict[str, float], str]] = {
    "entropy_collapse": ({"entropy": 0.09}, "entropy went from 1 to 0.09 nats a token"),
    "entropy_blow_up": ({"entropy": 3.1}, "the policy falls apart"),
    "cut_off": ({"completions/clipped_ratio": 0.51}, "51% of the completions are cut off at max_completion_length=8"),
    "no_signal": (
        {"questions/zero_variance": 0.95},
        "95% of the questions teach nothing (90% are always answered wrong",
    ),
    "no_answer": ({"answers/parse_failures": 0.6}, "no final answer is found in 60%"),
    "sampler_differs": (
        {"rollout/logprob_gap": 0.06},
        "sampler and trainer differ by 0.06 nats a token (0.01 at first)",
    ),
}


def make(rank: int = 0, deciding: tuple[int, ...] = (0,)) -> Rails:
    ctx = StageContext("rl", None, Path("unused"), rank=rank)
    return Rails(ctx, GrpoConfig(**SMALL), list(deciding))


def look(rails: Rails, steps: range, **changed: float) -> None:
    for step in steps:
        rails.look(step, {**GOOD, **changed})


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_comes_after_patience_and_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    sign, sentence = ALARMS[name]
    rails = make()
    look(rails, range(1, 3))
    look(rails, range(3, 2 + PATIENCE), **sign)
    assert rails.alarms == [] and caplog.text == ""
    look(rails, range(2 + PATIENCE, 30), **sign)
    (alarm,) = rails.alarms
    assert (alarm["name"], alarm["step"]) == (name, 2 + PATIENCE) and sentence in alarm["what"]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert f"stages.rl, step {2 + PATIENCE}: " in caplog.text


@pytest.mark.parametrize("name", ALARMS)
def test_a_good_batch_between_starts_the_count_again(name: str) -> None:
    rails = make()
    look(rails, range(1, 2))
    for start in (2, 20):
        look(rails, range(start, start + PATIENCE - 1), **ALARMS[name][0])
        look(rails, range(start + PATIENCE, start + PATIENCE + 1))
    assert rails.alarms == []


@pytest.mark.parametrize("name", ALARMS)
def test_a_resumed_run_raises_the_same_alarms(name: str) -> None:
    sign = ALARMS[name][0]
    first = make()
    look(first, range(1, 2))
    look(first, range(2, 1 + PATIENCE), **sign)
    second = make()
    second.load(json.loads(json.dumps(first.state())))
    for rails in (first, second):
        look(rails, range(1 + PATIENCE, 12), **sign)
    assert first.alarms == second.alarms and first.state() == second.state()
    assert [alarm["step"] for alarm in second.alarms] == [1 + PATIENCE]
    third = make()
    third.load(second.state())
    look(third, range(12, 24), **sign)
    assert len(third.alarms) == 1


def test_signs_at_their_limits_and_absent_metrics_alarm_nobody() -> None:
    rails = make()
    look(rails, range(1, 20))
    for step in range(20, 40):
        rails.look(step, {"loss": 0.1, "entropy": 0.5})
    rails.look(40, {"loss": 0.1, "questions/zero_variance": None, "entropy": None})
    assert rails.alarms == []


def test_steps_without_a_batch_do_not_break_a_streak() -> None:
    """With several steps a batch its rewards are in the log of the first one only."""
    rails = make()
    for step in range(2 * PATIENCE):
        rails.look(step, {"entropy": 1.0} if step % 2 else {**GOOD, "answers/parse_failures": 1.0})
    assert [alarm["name"] for alarm in rails.alarms] == ["no_answer"]


def test_the_remedy_depends_on_what_is_flat() -> None:
    said = []
    for wrong in (0.9, 0.1):
        rails = make()
        look(rails, range(PATIENCE), **{"questions/zero_variance": 1.0, "questions/all_wrong": wrong})
        said.append(rails.alarms[0]["what"])
    assert "easier questions" in said[0] and "harder questions" in said[1]


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    rails = make(rank=1)
    look(rails, range(PATIENCE), **{"completions/clipped_ratio": 1.0})
    assert len(rails.alarms) == 1 and caplog.text == ""


def scored(*questions: list[Any]) -> torch.Tensor:
    """`[Q, G, rewards]` of single numbers or pairs."""
    return torch.tensor([[[one] if not isinstance(one, tuple) else list(one) for one in row] for row in questions])


def test_questions_that_teach_nothing_are_counted() -> None:
    groups = scored([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [-1.0, -1.0, -1.0], [1.0, 1.0, NAN])
    found = make().rewards(groups, {})
    assert found == {"questions/zero_variance": 0.8, "questions/all_wrong": 0.4, "questions/all_right": 0.4}


def test_a_question_without_a_score_is_neither_right_nor_wrong() -> None:
    found = make().rewards(scored([NAN, NAN], [0.0, 1.0]), {})
    assert set(found.values()) == {0.0}


def test_only_rewards_that_judge_are_looked_at() -> None:
    groups = scored([(1.0, 0.1), (1.0, 0.9)], [(0.0, 0.1), (1.0, 0.1)])
    assert make(deciding=(0,)).rewards(groups, {})["questions/zero_variance"] == 0.5
    assert make(deciding=()).rewards(groups, {})["questions/zero_variance"] == 0.0
    assert make(deciding=(1,)).rewards(groups, {})["questions/all_right"] == 0.5


def test_counts_are_shares_of_the_batch() -> None:
    assert make().rewards(scored([0.0]), {"timeouts": 4})["answers/timeouts"] == 4 / SMALL["generation_batch_size"]


def logs(count: int) -> dict[str, Any]:
    return {
        "prompt": [f"p{number}" for number in range(count)],
        "completion": [f"c{number}" for number in range(count)],
        "rewards": {"correct": [NAN if number % 2 else 1.0 for number in range(count)]},
        "advantages": [number / 8 for number in range(count)],
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("count", "kept"), [(1, [0]), (3, [0, 4, 8]), (4, [0, 3, 6, 9]), (40, list(range(10)))])
def test_some_completions_are_kept(count: int, kept: list[int], tmp_path: Path) -> None:
    log = CompletionLog(tmp_path, count)
    log.start(0)
    log.add(7, logs(10))
    assert [row["prompt"] for row in lines(tmp_path)] == [f"p{number}" for number in kept]
    first = {"step": 7, "prompt": "p0", "completion": "c0", "rewards": {"correct": 1.0}, "advantage": 0.0}
    assert lines(tmp_path)[0] == first
    assert {row["rewards"]["correct"] for row in lines(tmp_path)} <= {1.0, None}


def test_nothing_is_kept_of_nothing(tmp_path: Path) -> None:
    log = CompletionLog(tmp_path, 0)
    log.start(0)
    log.add(0, logs(4))
    CompletionLog(tmp_path, 2).add(0, logs(0))
    assert not (tmp_path / FILE).exists()


def test_what_a_killed_attempt_wrote_is_forgotten(tmp_path: Path) -> None:
    log = CompletionLog(tmp_path, 2)
    for step in range(4):
        log.add(step, logs(2))
    with log.path.open("a") as file:
        file.write('{"step": 1, "prompt": "half a li')
    log.start(2)
    assert [row["step"] for row in lines(tmp_path)] == [0, 0, 1, 1]
    log.start(0)
    assert log.path.read_text() == ""
