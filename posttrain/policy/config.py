"""Settings that stages with a policy gradient share; with `TrainingConfig` the only place of their defaults."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY
from posttrain.policy.trl_options import problem_of
from posttrain.rewards.config import AnswerFormat, GymReward, RewardSettings
from posttrain.training.adapters import LoraSettings
from posttrain.training.checks import no_graph_of_trl, one_choice_of_weights
from posttrain.training.config import TrainingConfig

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]

Rollout = Literal["auto", "engine", "transformers", "continuous_batching", "vllm_colocate", "vllm_server"]


class PolicyConfig(TrainingConfig):
    """Reinforcement learning with verifiable rewards: roll out, score, step; what its variants have in common."""

    max_steps: int = Field(200, ge=1, description="Optimiser steps.")
    lr: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW; adapters want about ten times more.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "constant", description="After the warm-up: half a cosine to 0, a line to 0, or the peak throughout."
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of max_steps in which the rate rises from 0, rounded up to whole steps."
    )
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="Completions of one forward pass, at most: the largest divisor of an update's share is taken.",
        json_schema_extra=NOT_IN_KEY,
    )

    num_generations: int = Field(8, ge=2, description="Completions of each question: the group that is compared.")
    generation_batch_size: int = Field(
        512, ge=2, description="Completions of one roll-out batch, over all ranks: questions times num_generations."
    )
    updates_per_generation: int = Field(
        1,
        ge=1,
        description="Optimiser steps that share a roll-out batch, each with a part of it. TRL's steps_per_generation "
        "counted in optimiser steps.",
    )
    num_iterations: int = Field(1, ge=1, description="Times a roll-out batch is gone through (mu of the GRPO paper).")
    max_prompt_length: int = Field(
        512, ge=1, description="Longest prompt, tokens; rows with a longer one are left out and counted."
    )
    max_completion_length: int = Field(256, ge=1, description="Longest completion, tokens; it is cut off there.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature; log-probabilities of the loss are taken at it too."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the smallest set of tokens with this probability.")
    top_k: int = Field(0, ge=0, description="Sample from the k most likely tokens; 0 = all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Sample no token below this share of the likeliest one's.")

    rollout: Rollout = Field(
        "auto",
        description="What writes the completions. engine: our decoder on static caches, graphs on a GPU; transformers: "
        "TRL's own use of generate(); continuous_batching: transformers' paged decoder; vllm_colocate, vllm_server: "
        "vLLM in this process or a server of yours (trl.vllm_server_base_url). auto: the engine, or transformers for "
        "a model that it does not know.",
    )
    rollout_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="The engine's weights and caches; auto: bfloat16 on a GPU, float32 on a CPU."
    )
    rollout_rows: int = Field(
        1024,
        ge=1,
        description="Completions that the engine decodes side by side on one rank, at most.",
        json_schema_extra=NOT_IN_KEY,
    )

    rewards: dict[str, RewardSettings] = Field(
        default_factory=lambda: {"correct": GymReward()},
        min_length=1,
        description="Rewards by a name of yours, each with type, weight and settings of its own; their weighted sum "
        "counts.",
    )
    answer: AnswerFormat = Field(
        default_factory=AnswerFormat, description="How the final answer is found in a completion."
    )
    reward_workers: int = Field(
        2, ge=1, description="Processes that score answers, on each rank.", json_schema_extra=NOT_IN_KEY
    )

    loss_type: LossType = Field(
        "grpo",
        description="TRL's loss. grpo: mean over each completion's tokens, then over completions; bnpo: mean over all "
        "tokens of the step; dapo: over those of the roll-out batch, by its updates; dr_grpo: sum over tokens by "
        "max_completion_length; cispo, sapo, luspo, vespo: see TRL.",
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token",
        description="Ratio to the policy that wrote: of each token, or the length-normalised one of a whole "
        "completion (GSPO).",
    )
    epsilon: float = Field(0.2, gt=0, description="Ratios are clipped to 1 - epsilon from below.")
    epsilon_high: float | None = Field(
        None,
        gt=0,
        description="And to 1 + epsilon_high from above; null = epsilon. With cispo it is the bound itself.",
    )
    delta: float | None = Field(
        None, gt=1, description="Upper bound of a ratio with a negative advantage; null = none."
    )
    beta: float = Field(0.0, ge=0, description="Weight of the KL divergence from the input model; 0 = none is kept.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="Advantages are divided by the rewards' standard deviation of the group, the batch, or not.",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="Several rewards: weighted sum first, or each normalised in its group first."
    )
    mask_truncated_completions: bool = Field(
        False, description="Completions that were cut off at max_completion_length teach nothing."
    )
    top_entropy_quantile: float = Field(
        1.0, gt=0, le=1, description="Learn from this share of the tokens only, those of the highest entropy."
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of a bonus for entropy per token, nats.")
    trl: dict[str, Any] = Field(
        default_factory=dict, description="Further fields of TRL's GRPOConfig, passed on as they are."
    )

    trainable: Literal["all", "mixers"] = Field(
        "all", description="all parameters, or the token mixers (attention) alone with the rest frozen."
    )
    lora: LoraSettings | None = Field(
        None, description="Train low-rank adapters in place of the weights, and merge them in at the end; null = don't."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the saved weights. bfloat16 halves the folder and rounds small updates away: at this "
        "stage's rates most of what was learnt.",
    )
    kept_completions: int = Field(
        4,
        ge=0,
        description="Completions of every roll-out batch that are kept with their scores beside the history.",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        batch, group, updates = self.generation_batch_size, self.num_generations, self.updates_per_generation
        if batch % group:
            raise ValueError(
                f"generation_batch_size ({batch}) must be a multiple of num_generations ({group}), e.g. "
                f"generation_batch_size={max(1, batch // group) * group}"
            )
        if batch % updates:
            raise ValueError(
                f"generation_batch_size ({batch}) must be a multiple of updates_per_generation ({updates})"
            )
        if self.max_steps % self.steps_per_rollout:
            whole = max(1, self.max_steps // self.steps_per_rollout) * self.steps_per_rollout
            raise ValueError(
                f"max_steps ({self.max_steps}) must be a multiple of updates_per_generation x num_iterations "
                f"({self.steps_per_rollout}), e.g. max_steps={whole}"
            )
        return self

    @model_validator(mode="after")
    def _a_bound_above_one(self) -> Self:
        if self.loss_type == "cispo" and (self.epsilon_high or 0) < 1:
            raise ValueError("loss_type=cispo bounds the ratio itself by epsilon_high, which is then 1 or more, e.g. 5")
        return self

    @model_validator(mode="after")
    def _trl_fields(self) -> Self:
        for name in self.trl:
            if problem := problem_of(name, self.rollout):
                what, fix = problem
                raise ValueError(f"{what}{': ' + fix if fix else ''}")
        return self

    _one_choice_of_weights = model_validator(mode="after")(one_choice_of_weights)
    _no_graph = model_validator(mode="after")(no_graph_of_trl)

    @property
    def questions_per_batch(self) -> int:
        """Questions of one roll-out batch."""
        return self.generation_batch_size // self.num_generations

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps from one roll-out batch to the next."""
        return self.updates_per_generation * self.num_iterations

    @property
    def rollouts(self) -> int:
        """Roll-out batches of the whole run."""
        return self.max_steps // self.steps_per_rollout

    @property
    def sequences_per_step(self) -> int:
        """Completions of one optimiser step, over all micro-batches and ranks."""
        return self.generation_batch_size // self.updates_per_generation
