"""Settings of rewards: how the final answer is found in a completion, and what scores it.

What decides a score is in the key, time limits among it: an answer that is too slow for one limit is right under
another. Only how many processes score side by side is not.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY

FROZEN = ConfigDict(extra="forbid", frozen=True, defer_build=True)


def _compiles(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is no regular expression: {error}") from error


class AnswerFormat(BaseModel):
    """How the final answer is found in a completion. Where it is not found, correctness rewards are 0."""

    model_config = FROZEN

    find: Literal["tag", "boxed", "last_line", "whole", "regex"] = Field(
        "tag",
        description="tag: within the last complete `<answer>…</answer>`; boxed: within the last balanced `\\boxed{…}`; "
        "last_line: the last line that is not blank; whole: all of it; regex: the last match's group.",
    )
    tag: str = Field("answer", pattern=r"^[A-Za-z][\w-]*$", description="Name of the tag of `find: tag`.")
    pattern: str | None = Field(None, description="Regular expression with one group, for `find: regex`.")

    @model_validator(mode="after")
    def _pattern_fits(self) -> Self:
        if (self.find == "regex") != (self.pattern is not None):
            raise ValueError("`find: regex` needs a `pattern`, and only it takes one")
        if self.pattern is not None and (groups := _compiles(self.pattern).groups) != 1:
            raise ValueError(f"`pattern` must have one group, and has {groups}; (?:…) is a group that does not count")
        return self


class Reward(BaseModel):
    """Base of all rewards."""

    model_config = FROZEN

    correctness: ClassVar[bool] = True
    """Whether it says that an answer is right; the others shape how it is written."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Fields of a row of which it needs one; none: it reads no row."""
    reads_answer: ClassVar[bool] = True
    """Whether it scores the answer that `AnswerFormat` finds, and 0 without one; the others score the completion."""

    weight: float = Field(1.0, allow_inf_nan=False, description="Factor in the sum of all rewards.")


class TimedReward(Reward):
    """Base of the rewards that are computed in another process, under a deadline."""

    seconds: float = Field(10.0, gt=0, description="Time for one answer; after it the answer scores 0.")


class GymReward(TimedReward):
    """The task's own `score_answer` (reasoning_gym), on rows with `task`."""

    needs = ("task",)

    type: Literal["gym"] = "gym"
    threshold: float | None = Field(
        1.0,
        gt=0,
        le=1,
        description="Score 1 for at least this much of the task's own score and 0 for less; null = the task's own, "
        "with partial credit that also rewards answers which merely contain the right one.",
    )


class MathReward(TimedReward):
    """1 if the answer equals the row's `answer` as mathematics (math-verify), 0 if not."""

    needs = ("answer",)

    type: Literal["math"] = "math"
    decimals: int = Field(6, ge=0, le=15, description="Decimal places that numbers are compared to.")


class CodeReward(TimedReward):
    """1 if the answer, a Python program, passes all of the row's `tests` or its `test_code`, 0 if not.

    `tests`: a list of {"input", "output"}, standard input and what is expected on standard output, but for white space
    at line ends. `test_code`: assertions run after the program in the same process; a program that looks for them can
    pass them, so prefer `tests`. The program may import the standard library only.
    """

    needs = ("tests", "test_code")

    type: Literal["code"] = "code"
    isolation: Literal["namespaces", "rlimits"] = Field(
        "namespaces",
        description="namespaces: its own user, network, process, IPC and mount namespaces, with a root of its own that "
        "holds nothing but Python, read-only, and a folder in memory. rlimits: limits of time, memory and processes "
        "alone, for hosts without user namespaces: the program then runs as this user (as nobody where that is root), "
        "and can read and change what this user can, keys and weights included, and use the network: only on a host "
        "where that is harmless.",
    )
    memory_mb: int = Field(512, ge=64, description="Address space of each of the program's processes, MiB.")
    processes: int = Field(4, ge=1, le=64, description="Processes and threads that the program may have at once.")
    output_kb: int = Field(256, ge=1, le=65536, description="Output that is read, KiB; more is a wrong answer.")


class RegexReward(TimedReward):
    """1 where the completion matches a pattern, 0 where not."""

    correctness = False
    reads_answer = False

    type: Literal["regex"] = "regex"
    pattern: str = Field(description="Regular expression; `.` matches line ends only with (?s).")
    match: Literal["full", "search"] = Field(
        "full", description="full: the whole completion must match; search: some part of it."
    )
    seconds: float = Field(1.0, gt=0, description="Time for one completion; after it the completion scores 0.")

    @field_validator("pattern")
    @classmethod
    def _is_one(cls, pattern: str) -> str:
        _compiles(pattern)
        return pattern


class LengthReward(Reward):
    """0 up to `target` tokens, then linearly down to -1 at `limit` and beyond: range -1 to 0."""

    correctness = False
    reads_answer = False

    type: Literal["length"] = "length"
    target: int = Field(ge=0, description="Longest completion without a loss, tokens.")
    limit: int = Field(ge=1, description="Length at which the loss is whole, tokens.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.limit <= self.target:
            raise ValueError(f"`limit` ({self.limit}) must be above `target` ({self.target})")
        return self


class PluginReward(TimedReward):
    """The reward of an installed package, called for one completion at a time; see docs/extending.md."""

    reads_answer = False

    type: Literal["plugin"] = "plugin"
    name: str = Field(min_length=1, description="Its entry point's name under `posttrain.rewards`.")


RewardSettings = Annotated[
    GymReward | MathReward | CodeReward | RegexReward | LengthReward | PluginReward, Field(discriminator="type")
]


class PoolSettings(BaseModel):
    """The processes that score answers."""

    model_config = FROZEN

    workers: int = Field(
        4, ge=1, le=256, description="Processes that score side by side.", json_schema_extra=NOT_IN_KEY
    )
    memory_mb: int | None = Field(
        4096, ge=1024, description="Address space of each, MiB: what needs more scores 0. null = no limit."
    )

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide a score."""
        return {"memory_mb": self.memory_mb}
