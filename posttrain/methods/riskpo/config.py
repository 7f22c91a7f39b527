"""Settings of the `riskpo` stage; with `PolicyConfig` and `RiskSettings` the only place of its defaults."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.methods.riskpo.presets import PRESETS, fill
from posttrain.methods.riskpo.settings import RiskSettings
from posttrain.policy.config import PolicyConfig

Preset = Literal["rb", "paper", "released_dapo", "released_math", "neutral"]


class RiskpoConfig(PolicyConfig):
    """Train a policy on a risk measure of verifiable rewards: low scores count more than high ones (RiskPO)."""

    type: Literal["riskpo"] = "riskpo"

    generation_batch_size: int = Field(
        480,
        ge=2,
        description="Completions of one roll-out batch, over all ranks: questions times num_generations, and the "
        "questions a multiple of risk.bundle_size.",
    )
    preset: Preset = Field(
        "rb",
        description="Settings of `risk` and of the loss that belong together; given ones win. rb: ours, the paper's "
        "gradient with less noise; paper: arXiv:2510.00911; released_dapo, released_math: what the two published "
        "scripts run, which is another algorithm; neutral: GRPO.",
    )
    risk: RiskSettings = Field(
        default_factory=RiskSettings,
        description="The risk measure, its bundles, and how answers share a bundle's score.",
    )
    risk_reward: str | None = Field(
        None,
        description="Reward whose scores the risk is taken of; null = the sum of those that judge correctness. The "
        "others are added to the advantages, centred within their group.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return fill({"preset": "rb", **data} if isinstance(data, dict) else data)

    @model_validator(mode="after")
    def _whole_bundles(self) -> Self:
        size, questions = self.risk.bundle_size, self.questions_per_batch
        if self.risk.level == "bundle" and questions % size:
            whole = max(1, questions // size) * size * self.num_generations
            raise ValueError(
                f"the {questions} questions of a roll-out batch (generation_batch_size={self.generation_batch_size} by "
                f"num_generations={self.num_generations}) are no whole number of bundles of {size}: "
                f"generation_batch_size={whole} has {whole // self.num_generations} questions, or set risk.bundle_size"
            )
        return self

    @model_validator(mode="after")
    def _a_reward_to_take_risk_of(self) -> Self:
        if self.risk_reward is not None and self.risk_reward not in self.rewards:
            raise ValueError(f"risk_reward={self.risk_reward} is none of the rewards {', '.join(self.rewards)}")
        if not self.risk_rewards:
            raise ValueError("no reward judges correctness: name the one to take the risk of in risk_reward")
        return self

    @model_validator(mode="after")
    def _advantages_of_one_kind(self) -> Self:
        if self.scale_rewards != PRESETS[self.preset]["loss"]["scale_rewards"]:
            raise ValueError(f"scale_rewards={self.scale_rewards} is GRPO's and does nothing here: set risk.scale")
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "multi_objective_aggregation=normalize_then_sum is GRPO's: here `risk` makes the advantages"
            )
        return self

    @model_validator(mode="after")
    def _tries_that_can_be_counted(self) -> Self:
        if self.risk.risk != "pass_at_k":
            return self
        if self.risk.k > self.num_generations:
            raise ValueError(f"risk.k={self.risk.k} exceeds num_generations={self.num_generations}")
        rewards = [self.rewards[name] for name in self.risk_rewards]
        partial = [reward for reward in rewards if reward.weight != 1 or getattr(reward, "threshold", 1.0) is None]
        if len(rewards) != 1 or partial:
            raise ValueError("risk.risk=pass_at_k is of one reward of 0 or 1, with weight 1 and without partial credit")
        return self

    @property
    def risk_rewards(self) -> tuple[str, ...]:
        """Names of the rewards that the risk is taken of."""
        if self.risk_reward is not None:
            return (self.risk_reward,)
        return tuple(name for name, reward in self.rewards.items() if reward.correctness)
