"""The `grpo` stage: TRL's `GRPOTrainer` with its own advantages."""

from __future__ import annotations

from typing import ClassVar

from posttrain.methods.grpo.config import GrpoConfig
from posttrain.policy.stage import PolicyStage


class Grpo(PolicyStage):
    """Reinforcement learning with verifiable rewards, advantages within the group of a question's completions."""

    type: ClassVar[str] = "grpo"
    version: ClassVar[str] = "1"
    Config = GrpoConfig
