"""How tokens are chosen: greedily, or drawn from a filtered distribution. Imports no torch: stage settings hold one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-4, 1e4
"""Nearer to zero fp32 overflows, and 0 / 0 is NaN where the number rounds to zero; farther, all draws are uniform."""


class Sampling(BaseModel):
    """What `DecodeEngine.generate` does with the logits of a step; the meaning and order of transformers' warpers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(128, ge=1, description="Most tokens written after each prompt.")
    temperature: float = Field(
        0.0,
        ge=0,
        le=MOST_TEMPERATURE,
        allow_inf_nan=False,
        description=f"Logits are divided by it: {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}; 0 is greedy.",
    )
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this probability.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens below this share of the likeliest one's probability."
    )
    seed: int = Field(0, description="With the row's id and the step it decides every draw.")
    stop: tuple[int, ...] = Field((), description="Token ids that end a row; the one that did is part of its tokens.")

    @field_validator("temperature")
    @classmethod
    def _far_enough_from_zero(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"too close to zero (at least {LEAST_TEMPERATURE:g}); 0 = greedy")
        return value

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def filters(self) -> bool:
        """Whether some token can be taken out before the draw."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    def program(self) -> tuple[Any, ...]:
        """What a captured step depends on; two settings with equal programs share their graphs."""
        if self.greedy:
            return ("greedy",)
        return ("draw", self.temperature, self.top_k, self.top_p, self.min_p)
