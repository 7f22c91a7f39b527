"""Settings of the `grpo` stage; with `PolicyConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Literal

from posttrain.policy.config import PolicyConfig


class GrpoConfig(PolicyConfig):
    """Train a policy on verifiable rewards, each completion judged against the others of its question (GRPO)."""

    type: Literal["grpo"] = "grpo"
