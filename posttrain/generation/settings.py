"""How tokens are chosen: greedily, or drawn from a filtered distribution. Imports no torch: stage settings hold one."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Sampling(BaseModel):
    """What `DecodeEngine.generate` does with the logits of a step; the meaning and order of transformers' warpers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(128, ge=1, description="Most tokens written after each prompt.")
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False, description="Logits are divided by it; 0 is greedy.")
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the smallest set of tokens with this probability.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Drop tokens below this share of the likeliest one's probability."
    )
    seed: int = Field(0, description="With the row's id and the step it decides every draw.")
    stop: tuple[int, ...] = Field((), description="Token ids that end a row; the one that did is part of its tokens.")

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
