"""A set of named rewards that scores a batch of completions."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import TracebackType
from typing import Any, Self

from posttrain.errors import Problem, RecipeError
from posttrain.rewards import plugin
from posttrain.rewards.config import (
    AnswerFormat,
    CodeReward,
    GymReward,
    LengthReward,
    MathReward,
    PluginReward,
    RegexReward,
    Reward,
    RewardSettings,
    TimedReward,
)
from posttrain.rewards.extraction import find_answer
from posttrain.rewards.pool import Job, Outcome, Pool
from posttrain.rewards.text import length_score

COUNTS = ("parse_failures", "timeouts", "crashes", "errors", "gold_failures", "unscored")
"""parse_failures: completions with no answer. timeouts, crashes, errors: scores of 0 because scoring an answer was too
slow, ended its process, or raised. gold_failures: what the row holds cannot be scored against. unscored: all None."""

STATUS_COUNTS = {"timeout": "timeouts", "crashed": "crashes", "error": "errors"}

FIND_SECONDS = 1.0
"""Time for a user's pattern on one completion."""

CODE_GRACE = 5.0
"""The program's own deadline comes first: it costs no worker. This much later the worker is killed."""

PREPARED = {
    GymReward: ("posttrain.rewards.gym", "reasoning_gym"),
    MathReward: ("posttrain.rewards.math:warm",),
    CodeReward: ("posttrain.rewards.code",),
    RegexReward: ("posttrain.rewards.text",),
}
"""Type of reward to what its workers import or call before the first answer's time begins."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch.

    Attributes:
        by_reward: reward to one score a completion; None: it cannot be scored, which is not the answer's fault and must
            not be taken for wrong.
        counts: see `COUNTS`.
        correctness: the rewards that say whether an answer is right.
    """

    by_reward: dict[str, list[float | None]]
    counts: dict[str, int]
    correctness: frozenset[str] = frozenset()

    def total(self, weights: Mapping[str, float], only: Collection[str] | None = None) -> list[float | None]:
        """The weighted sum of each completion's scores.

        A reward that cannot score a completion adds nothing to it. None where no correctness reward can, if there are
        any: the sum would say how the answer is written and be taken for whether it is right.

        Args:
            weights: reward to its factor, for every reward.
            only: the rewards that count; None: all.
        """
        counted = {name: scores for name, scores in self.by_reward.items() if only is None or name in only}
        deciding = [name for name in counted if name in self.correctness] or list(counted)
        totals: list[float | None] = []
        for index in range(len(next(iter(counted.values()), []))):
            here = {name: scores[index] for name, scores in counted.items()}
            known = any(here[name] is not None for name in deciding)
            found = sum(weights[name] * score for name, score in here.items() if score is not None)
            totals.append(float(found) if known else None)
        return totals


class RewardSet:
    """Scores completions by several rewards, in worker processes of its own; `with` ends them.

    Args:
        rewards: name to settings.
        answer: how the final answer is found.
        workers: processes that score side by side.
        memory_mb: address space of each, MiB; None = no limit.
        where: path of the settings in the recipe, for messages.

    Raises:
        RecipeError: an installed package has no such reward.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardSettings],
        answer: AnswerFormat,
        *,
        workers: int = 2,
        memory_mb: int | None = 4096,
        where: str = "rewards",
    ) -> None:
        self.rewards, self.answer, self.where = dict(rewards), answer, where
        for name, reward in self.rewards.items():
            if isinstance(reward, PluginReward):  # a missing one is told now, and the manifest names its package
                plugin.load(reward.name, f"{where}.{name}")
        kinds = {type(reward) for reward in self.rewards.values()}
        prepare = [name for kind in PREPARED if kind in kinds for name in PREPARED[kind]]
        # An installed package's reward is trusted with the environment: it may need a key or a cache folder.
        environment = dict(os.environ) if PluginReward in kinds else None
        self._pool = Pool(workers, prepare=prepare, memory_mb=memory_mb, environment=environment, where=where)

    def warm(self) -> None:
        """Start the workers now, so that the first batch need not wait. Raises StageError when they do not start."""
        if self.answer.find == "regex" or any(isinstance(reward, TimedReward) for reward in self.rewards.values()):
            self._pool.warm()

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        lengths: Sequence[int],
        at_score: Callable[[], None] = lambda: None,
    ) -> Scores:
        """The scores of a batch; an answer that hangs, crashes or attacks its scorer has 0.

        Args:
            rows: the data set's rows that the prompts come from.
            lengths: of the completions, tokens.
            at_score: called as scores come in.

        Raises:
            StageError: nothing can be scored, because workers do not start, a sandbox cannot be had, or an installed
                package's reward breaks its promise.
        """
        batch = _Batch(prompts, completions, rows, lengths)
        counts = dict.fromkeys(COUNTS, 0)
        answers = self._answers(batch, counts)
        by_reward: dict[str, list[float | None]] = {name: [None] * len(completions) for name in self.rewards}
        jobs: list[Job] = []
        places: list[tuple[str, int]] = []
        for name, reward in self.rewards.items():
            for index, answer in enumerate(answers):
                made = self._job(name, reward, batch, index, answer)
                if isinstance(made, Job):
                    jobs.append(made)
                    places.append((name, index))
                else:
                    by_reward[name][index] = made
        for (name, index), outcome in zip(places, self._pool.run(jobs, at_score), strict=True):
            by_reward[name][index] = _settled(outcome, counts)
        counts["unscored"] = sum(score is None for scores in by_reward.values() for score in scores)
        correctness = frozenset(name for name, reward in self.rewards.items() if reward.correctness)
        return Scores(by_reward, counts, correctness)

    def _answers(self, batch: _Batch, counts: dict[str, int]) -> list[str | None]:
        if not any(reward.reads_answer for reward in self.rewards.values()):
            return [None] * len(batch.completions)
        if self.answer.find == "regex":
            pattern = self.answer.pattern
            function = "posttrain.rewards.extraction:last_match"
            outcomes = self._pool.run([Job(function, (text, pattern), FIND_SECONDS) for text in batch.completions])
            answers = [outcome.value for outcome in outcomes]
            for outcome in outcomes:
                _count(outcome, counts)
        else:
            answers = [find_answer(text, self.answer) for text in batch.completions]
        counts["parse_failures"] += sum(answer is None for answer in answers)
        return answers

    def _job(self, name: str, reward: Reward, batch: _Batch, index: int, answer: str | None) -> Job | float | None:
        """What is to be done for one score, or the score where nothing is."""
        row, completion = batch.rows[index], batch.completions[index]
        if reward.needs and all(row.get(field) is None for field in reward.needs):
            return None
        if reward.reads_answer and answer is None:
            return 0.0
        match reward:
            case GymReward():
                return Job("posttrain.rewards.gym:score", (answer, row["task"], reward.threshold), reward.seconds)
            case MathReward():
                gold = str(row["answer"])
                return Job("posttrain.rewards.math:score", (answer, gold, reward.decimals), reward.seconds)
            case CodeReward():
                tests = row.get("tests"), row.get("test_code")
                return Job("posttrain.rewards.code:score", (answer, *tests, reward), reward.seconds + CODE_GRACE)
            case RegexReward():
                arguments = (completion, reward.pattern, reward.match == "full")
                return Job("posttrain.rewards.text:score", arguments, reward.seconds)
            case LengthReward():
                return length_score(batch.lengths[index], reward.target, reward.limit)
            case PluginReward():
                where = f"{self.where}.{name}"
                arguments = (reward.name, where, batch.prompts[index], completion, dict(row))
                return Job("posttrain.rewards.plugin:score", arguments, reward.seconds)
        raise TypeError(f"unknown reward {reward!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def identity(settings: RewardSettings, where: str = "reward") -> dict[str, str]:
    """What enters a key beside the settings: versions of the packages that decide the score.

    Raises:
        RecipeError: an installed package has no such reward.
    """
    match settings:
        case GymReward():
            return {"reasoning_gym": metadata.version("reasoning_gym")}
        case MathReward():
            packages = ("math-verify", "latex2sympy2_extended", "sympy")
            return {package: metadata.version(package) for package in packages}
        case PluginReward():
            return plugin.identity(settings.name, where)
    return {}


def check_rows(rewards: Mapping[str, RewardSettings], fields: Collection[str], where: str = "rewards") -> None:
    """Raises RecipeError if the data set's rows have none of the fields that a reward needs, or no reward is there.

    Args:
        fields: what rows of the data set have.
    """
    problems = [
        Problem(
            f"reward `{name}` ({reward.type}) needs rows with {' or '.join(f'`{field}`' for field in reward.needs)}",
            f"{where}.{name}",
            f"choose data that has it (the rows have {', '.join(sorted(fields)) or 'neither'}), or another reward",
        )
        for name, reward in rewards.items()
        if reward.needs and not set(reward.needs) & set(fields)
    ]
    if not rewards:
        problems.append(Problem("there is no reward", where, "name one, as `correct: {type: gym}`"))
    if problems:
        raise RecipeError(problems=problems)


@dataclass(frozen=True)
class _Batch:
    prompts: Sequence[str]
    completions: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    lengths: Sequence[int]

    def __post_init__(self) -> None:
        sizes = [len(self.prompts), len(self.completions), len(self.rows), len(self.lengths)]
        if len(set(sizes)) != 1:
            raise ValueError("{} prompts, {} completions, {} rows, {} lengths".format(*sizes))


def _count(outcome: Outcome, counts: dict[str, int]) -> None:
    if outcome.status in STATUS_COUNTS:
        counts[STATUS_COUNTS[outcome.status]] += 1


def _settled(outcome: Outcome, counts: dict[str, int]) -> float | None:
    """The score that an outcome means; what else it says is counted."""
    _count(outcome, counts)
    if outcome.status != "value":
        return 0.0
    score, reason = outcome.value
    if reason:
        counts[reason] += 1
    return score
