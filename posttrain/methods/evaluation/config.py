"""Settings of the `evaluate` stage."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from posttrain.generation.settings import MOST_TEMPERATURE, Sampling
from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig
from posttrain.rewards.config import AnswerFormat, GymReward, PoolSettings, RewardSettings

PROMPTS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "List three fruits.",
    "Write a short polite email asking for a day off.",
)


class ProblemSettings(BaseModel):
    """Answers sampled to the problems of the data set, and how often they are right: pass@k."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    samples: int = Field(16, ge=1, description="Answers sampled to each problem.")
    k: tuple[int, ...] = Field(
        (1, 4, 16),
        min_length=1,
        description="Numbers of tries for which the chance of at least one right answer is estimated, each at most "
        "`samples`; 1 is always among them.",
    )
    max_problems: int = Field(200, ge=1, description="Problems to answer, from the start of the data set.")
    max_new_tokens: int = Field(128, ge=1, description="Longest answer, tokens; longer ones are cut off.")
    temperature: float = Field(
        1.0, ge=0, le=MOST_TEMPERATURE, allow_inf_nan=False, description="Sampling temperature; 0 = greedy, one sample."
    )
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this probability.")
    batch_rows: int = Field(64, ge=1, description="Answers written side by side; decides the last bits.")
    reward: RewardSettings = Field(
        default_factory=GymReward, description="Scores an answer; from 1 on it is right. It must say what is right."
    )
    answer: AnswerFormat = Field(default_factory=AnswerFormat, description="How the final answer is found.")
    pool: PoolSettings = Field(default_factory=PoolSettings, description="The processes that score.")

    @field_validator("k")
    @classmethod
    def _one_is_among_them(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("numbers of tries begin at 1")
        return tuple(sorted({1, *value}))

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.k[-1] > self.samples:
            most, fitting = self.k[-1], [k for k in self.k if k <= self.samples]
            raise ValueError(f"k={most} needs {most} samples, not {self.samples}: set samples={most} or k={fitting}")
        if not self.reward.correctness:
            raise ValueError(f"reward {self.reward.type} does not say whether an answer is right")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("greedy samples are all alike: temperature=0 needs samples=1 k=[1]")
        try:
            self.sampling(0, ())
        except ValidationError as error:
            raise ValueError(f"`{error.errors()[0]['loc'][0]}`: {error.errors()[0]['msg']}") from error
        return self

    def sampling(self, seed: int, stop: tuple[int, ...]) -> Sampling:
        """How the answers are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=seed,
            stop=stop,
        )

    def key_fields(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {**self.model_dump(mode="json"), "pool": self.pool.key_fields()}


WIDE_BYTES = 2 * 2**30
"""Of copies of a prompt's cache: as many of a needle's candidates are read side by side."""


class NeedleSettings(BaseModel):
    """A sentence with a key hidden in long text, and how surely it is found again: retrieval from long contexts."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    lengths: tuple[int, ...] = Field(
        (2048, 8192),
        min_length=1,
        description="Lengths in tokens, each of a whole prompt with the room for its answer (`max_new_tokens`); at "
        "most the model's max_position_embeddings.",
    )
    depths: int = Field(
        5,
        ge=1,
        description="Places of the sentence, evenly spaced from beginning (0) to end (1); one: the middle.",
    )
    samples: int = Field(4, ge=1, description="Prompts of each length and depth, each with a key and text of its own.")
    key: Literal["number", "phrase", "code"] = Field(
        "number", description="What is hidden: 7 digits, an adjective with a noun, or 8 letters and digits."
    )
    candidates: int = Field(
        16, ge=2, le=256, description="Keys among which the right one must be the most likely; chance is one of them."
    )
    max_new_tokens: int = Field(24, ge=1, description="Longest greedy answer, tokens; a key must fit into it.")
    seed: int = Field(
        0,
        ge=0,
        description="Of keys, names and where the text begins; not the run's, so that runs share prompts.",
    )

    @field_validator("lengths")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _a_prompt_has_room(self) -> Self:
        if self.lengths[0] <= self.max_new_tokens:
            raise ValueError(f"a length of {self.lengths[0]} tokens has no room beside {self.max_new_tokens} new ones")
        return self

    @property
    def prompts(self) -> int:
        """Prompts of one length."""
        return self.depths * self.samples

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return self.prompts * sum(length - self.max_new_tokens for length in self.lengths)

    def places(self) -> tuple[float, ...]:
        """The depths, as shares of the text."""
        return (0.5,) if self.depths == 1 else tuple(index / (self.depths - 1) for index in range(self.depths))


class EvaluateConfig(StageConfig):
    """Held-out perplexity, agreement with a baseline, cache bytes, speed and sample texts of one model."""

    type: Literal["evaluate"] = "evaluate"
    max_documents: int = Field(40, ge=2, description="Documents to score, from the start of the data set.")
    max_tokens: int = Field(
        512,
        ge=2,
        description="Window length in tokens; never more than the model's max_position_embeddings. "
        "The first token of a window is context and is not scored.",
    )
    max_windows: int = Field(
        1, ge=1, description="Non-overlapping windows scored per document, from its start; the rest is left out."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Data type the weights are cast to, and so of the activations and the cache. Log-probabilities "
        "are always taken in fp32 and summed in fp64.",
    )
    chunk_tokens: int = Field(
        256,
        ge=1,
        description="Tokens whose logits exist at once: memory only, not the result.",
        json_schema_extra=NOT_IN_KEY,
    )
    bootstrap_samples: int = Field(
        1000, ge=100, description="Resamples of the documents behind the 95 % intervals (seeded)."
    )
    prompts: tuple[str, ...] = Field(
        PROMPTS,
        description="User messages answered greedily by the model and by the baseline, through the chat template if "
        "the model has one, else continued as plain text. May be empty.",
    )
    generate_tokens: int = Field(48, ge=1, description="Most tokens generated per prompt.")
    prefill_tokens: int = Field(256, ge=2, description="Prompt length of the speed measurement, tokens per sequence.")
    decode_tokens: int = Field(32, ge=1, description="Tokens decoded one by one after that prompt, per sequence.")
    batch_size: int = Field(1, ge=1, description="Sequences side by side in the speed measurement.")
    repeats: int = Field(
        3, ge=0, description="Timed repeats after one warm-up; the median counts. 0 leaves the speed measurement out."
    )
    problems: ProblemSettings | None = Field(
        None, description="Answers to the problems of the data set are sampled and scored (pass@k); null = none."
    )
    needle: NeedleSettings | None = Field(
        None, description="A key hidden in long text of the data set is asked for; {} = the default sizes, null = none."
    )

    def key_fields(self) -> dict[str, Any]:
        """Without `problems` and `needle` the key is what it was before there were any."""
        fields = super().key_fields()
        for section in ("problems", "needle"):
            if fields[section] is None:
                fields.pop(section)
        return fields if self.problems is None else {**fields, "problems": self.problems.key_fields()}
