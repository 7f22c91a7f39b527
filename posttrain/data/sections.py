"""Settings of the builders behind a recipe's `data:` section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY

Package = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]


class HubData(BaseModel):
    """A data set of the Hugging Face hub, streamed."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    name: str = Field(description="Name on the hub, `owner/name`.")
    config: str | None = Field(None, description="Configuration (subset) of the data set.")
    split: str = Field("train", description="Split to read.")
    revision: str | None = Field(None, description="Commit or tag; None: the newest.")
    max_rows: int = Field(20_000, ge=2, description="Rows to stream.")
    licence: str = Field("see the data set's page on the hub", description="Written into dataset.json.")
    question_field: str | None = Field(
        None,
        description="Field with a problem's question, a text or turns; dots lead into a field, as `extra.question`. "
        "Rows become conversations of question and solution that keep the right answer as `answer`.",
    )
    answer_field: str | None = Field(
        None, description="Field that holds the right answer, dots as above; it becomes the row's `answer`."
    )
    answer_pattern: str | None = Field(
        None,
        description="Where the answer stands in that field: a regular expression with one group, of which the last "
        "match counts, or `boxed` for the last \\boxed{…}; null = the whole field. Rows without one are left out.",
    )
    solution_field: str | None = Field(
        None, description="Field with a worked solution: the assistant's turn; null = the answer alone."
    )
    answer_text: str = Field(
        "\\boxed{{answer}}",
        description="Last line of the assistant's turn; {answer} is the right answer. Left out where the solution has "
        "it already; what `answer_pattern` matched in a solution is taken off.",
    )
    instruction: str | None = Field(
        None, description="Put behind each question after a blank line: how the answer is to be written."
    )

    @model_validator(mode="after")
    def _problem_is_whole(self) -> Self:
        if (self.question_field or self.answer_pattern) and not self.answer_field:
            raise ValueError("`question_field` and `answer_pattern` need an `answer_field`")
        if (self.solution_field or self.instruction) and not self.question_field:
            raise ValueError("`solution_field` and `instruction` need a `question_field`")
        if "{answer}" not in self.answer_text:
            raise ValueError("`answer_text` must contain {answer}")
        if self.answer_pattern not in (None, "boxed") and _groups(self.answer_pattern) != 1:
            raise ValueError("`answer_pattern` must have one group; (?:…) is a group that does not count")
        return self


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"`answer_pattern` is no regular expression: {error}") from error


PROBLEM_FIELDS = ("question_field", "answer_field", "answer_pattern", "solution_field", "answer_text", "instruction")
"""Settings of `HubData` that came later: at their defaults they are not in the key."""


class PythonText(BaseModel):
    """Documentation out of the installation."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    packages: list[Package] = Field(
        default_factory=list,
        description="Packages, or parts of them as `torch.nn`, whose documentation is taken besides the standard "
        "library's. What is not installed is left out.",
    )
    max_bytes: int | None = Field(None, ge=1, description="Most text to keep, bytes, held-out text included.")


class Samples(BaseModel):
    """How the input model is sampled. Changing any of these gives other text."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    prompts: list[str] | None = Field(None, min_length=2, description="User turns; None: the built-in prompts.")
    num_samples: int = Field(512, ge=2, description="Answers in all, train and held-out together.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer, tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with this probability.")
    batch_size: int = Field(32, ge=1, description="Answers generated together; the random numbers are drawn per batch.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the sampling model.")


class GymTasks(BaseModel):
    """Generated tasks with checkable answers, of the package `reasoning_gym`."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    tasks: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {name: dict(settings) for name, settings in EASY_TASKS.items()},
        min_length=1,
        description="Tasks by name, each with settings of its generator ({}: the generator's own). The default's are "
        "small enough for a model of 135 million parameters to solve some. Naming one replaces them all.",
    )
    only: tuple[str, ...] | None = Field(
        None, min_length=1, description="Of `tasks` these alone, as an option's mix has more; null = all."
    )
    size: int = Field(2000, ge=2, description="Problems in all, train and held-out together, from every task in turn.")
    answer_format: Literal["plain", "tag"] = Field(
        "plain",
        description="plain: the assistant's turn is the right answer; tag: it is `<answer>…</answer>`, the question "
        "says so, and the row has the right answer as `answer` too.",
    )
    instruction: str | None = Field(
        None,
        description="Put behind each question after a blank line; null = with answer_format=tag a fixed sentence, "
        "with plain nothing.",
    )
    difficulty: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None,
        min_length=1,
        description="Levels of reasoning_gym's own curricula, a number or a list: every task at each level in turn, "
        "named as the row's `task.difficulty`. An attribute of a task with fewer levels stays at its last; ranges "
        "begin at level 0; settings under `tasks` win. null = no curriculum.",
    )

    @model_validator(mode="before")
    @classmethod
    def _those_alone(cls, data: Any) -> Any:
        """`tasks` without the others: whatever is made of them knows no `only`."""
        if not isinstance(data, dict) or not isinstance(chosen := data.get("only"), list | tuple):
            return data
        tasks = data.get("tasks", EASY_TASKS)
        if not isinstance(tasks, dict):
            return data
        if unknown := [name for name in chosen if name not in tasks]:
            raise ValueError(f"`only` names {unknown[0]}, and the tasks are {', '.join(tasks)}")
        return {**data, "tasks": {name: tasks[name] for name in tasks if name in chosen}}

    @field_validator("difficulty", mode="before")
    @classmethod
    def _one_level_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("difficulty")
    @classmethod
    def _levels_differ(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("names a level twice")
        return value


GYM_LATER = ("answer_format", "instruction", "difficulty", "only")
"""Settings of `GymTasks` that came later: at their defaults they are not in the key."""


EASY_TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 2, "max_words": 5},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 10},
    "gcd": {"max_value": 60},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "max_instances": 5},
    "number_format": {"max_num_candidates": 2, "max_n": 10_000},
}


class PairSamples(BaseModel):
    """How the input model is sampled for the rejected side of preference pairs. Changing any gives other pairs."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    tries: int = Field(
        4, ge=1, description="Answers sampled to a question until one is wrong; with none, the question is left out."
    )
    wrong_below: float = Field(
        0.5,
        gt=0,
        le=1,
        description="An answer that scores less is wrong, unless the right one stands in it: then it is neither.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest answer, tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus: smallest set of tokens with this probability.")
    batch_size: int = Field(64, ge=1, description="Questions answered together.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the sampling model.")
    reward: str | None = Field(
        None,
        description="Reward of an installed package that scores the answers (0 to 1) in place of the task's own "
        "`score_answer`; null = the task's.",
    )
    score_seconds: float = Field(
        10.0,
        gt=0,
        description="Time to score one answer; after it the answer is not used.",
        json_schema_extra=NOT_IN_KEY,
    )
