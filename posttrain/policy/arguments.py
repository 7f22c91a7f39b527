"""TRL's `GRPOConfig` for a stage's settings, and what writes its completions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from posttrain.errors import fail
from posttrain.generation import unsupported
from posttrain.pipeline.context import StageContext
from posttrain.policy.config import PolicyConfig

log = logging.getLogger(__name__)


class NamedReward:
    """Stands for a reward in TRL's tables; `PolicyTrainer` scores by itself."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[float]:
        raise NotImplementedError("rewards are scored by PolicyTrainer._calculate_rewards")


def uses_engine(config: PolicyConfig, policy: PreTrainedModel) -> bool:
    """Whether our decoder writes the completions.

    Raises:
        StageError: `rollout=engine` for a model that it does not know.
    """
    if config.rollout not in ("auto", "engine"):
        return False
    reason = "adapters" if config.lora else unsupported(policy)
    if reason is None:
        return True
    if config.rollout == "engine":
        fail(f"rollout=engine: the decoder does not support {reason}", fix="rollout=transformers")
    log.warning("completions are written by transformers' generate: the fast decoder does not support %s", reason)
    return False


def trl_arguments(ctx: StageContext, config: PolicyConfig) -> dict[str, Any]:
    """Fields of TRL's `GRPOConfig` for these settings."""
    micro_batch = config.micro_batch(ctx.world_size)
    accumulation = config.sequences_per_step // (micro_batch * ctx.world_size)
    return {
        "num_generations": config.num_generations,
        "steps_per_generation": accumulation * config.updates_per_generation,
        "num_iterations": config.num_iterations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "min_p": config.min_p or None,
        "reward_weights": [reward.weight for reward in config.rewards.values()],
        "loss_type": config.loss_type,
        "importance_sampling_level": config.importance_sampling_level,
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "delta": config.delta,
        "beta": config.beta,
        "scale_rewards": config.scale_rewards,
        "multi_objective_aggregation": config.multi_objective_aggregation,
        "mask_truncated_completions": config.mask_truncated_completions,
        "top_entropy_quantile": config.top_entropy_quantile,
        "entropy_coef": config.entropy_coef,
        # TRL loads the reference model by itself, and would share it out over all GPUs that it sees.
        **({"model_init_kwargs": {"device_map": None}} if config.beta and not config.lora else {}),
        "shuffle_dataset": False,
        "use_transformers_continuous_batching": config.rollout == "continuous_batching",
        "use_vllm": config.rollout.startswith("vllm"),
        **({"vllm_mode": config.rollout.removeprefix("vllm_")} if config.rollout.startswith("vllm") else {}),
        **config.trl,
    }
