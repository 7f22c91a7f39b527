"""Settings of the `distill` stage; the only place of its defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig


class DistillConfig(StageConfig):
    """Train a student to give the frozen teacher's next-token distribution on plain text."""

    type: Literal["distill"] = "distill"

    max_steps: int = Field(1000, ge=1, description="Optimiser steps.")
    tokens_per_step: int = Field(
        393_216, ge=1, description="Tokens of one optimiser step, over all micro-batches and ranks."
    )
    sequence_length: int = Field(
        2048, ge=2, description="Tokens of one sequence. Documents are joined by EOS and cut; attention crosses them."
    )
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="Sequences of one forward pass, at most: the largest divisor of the sequences of a step is taken.",
        json_schema_extra=NOT_IN_KEY,
    )
    chunk_tokens: int = Field(
        1024,
        ge=1,
        description="Tokens whose logits exist at a time in the loss; lower it when memory is short.",
        json_schema_extra=NOT_IN_KEY,
    )

    lr: float = Field(8e-5, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="After the warm-up: half a cosine to 0, a line to 0, or the peak throughout."
    )
    warmup_ratio: float = Field(
        0.01, ge=0, lt=1, description="Share of max_steps in which the rate rises from 0, rounded up to whole steps."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay; not of norms and biases.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second-moment decay.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this L2 norm; 0 = no clipping.")

    reduction: Literal["token_mean", "batch_sum"] = Field(
        "token_mean",
        description="Loss of a step: mean over tokens, or sum over tokens divided by sequences (X-EcoMLA's code; with "
        "clipping at 1 that is training by normalised gradients). The history always has the token mean as `kl`.",
    )
    temperature: float = Field(1.0, gt=0, description="Divides both models' logits in the KL; no T² factor.")
    ce_weight: float = Field(0.0, ge=0, le=1, description="Weight w of next-token cross-entropy: (1 - w) KL + w CE.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: fp32 weights and optimiser under bf16 autocast. Parameters are never bf16."
    )
    teacher_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen teacher's weights; bfloat16 halves their memory."
    )
    trainable: Literal["all", "mixers"] = Field(
        "all", description="all parameters, or the token mixers (attention) alone with the rest frozen."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the saved weights. bfloat16 halves the folder and rounds small updates away: "
        "only for a last stage.",
    )

    gradient_checkpointing: bool = Field(
        False,
        description="Keep one tensor a layer and compute the rest again: less memory, about a third slower.",
        json_schema_extra=NOT_IN_KEY,
    )
    save_every: int = Field(
        0, ge=0, description="Optimiser steps between checkpoints; 0 = by time alone.", json_schema_extra=NOT_IN_KEY
    )
    save_seconds: float = Field(
        600.0, ge=0, description="Seconds between checkpoints; 0 = by steps alone.", json_schema_extra=NOT_IN_KEY
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Newest complete checkpoints kept while training.", json_schema_extra=NOT_IN_KEY
    )

    @model_validator(mode="after")
    def _whole_sequences(self) -> Self:
        if self.tokens_per_step % self.sequence_length:
            below = self.tokens_per_step // self.sequence_length * self.sequence_length
            nearest = below or self.sequence_length
            raise ValueError(
                f"tokens_per_step ({self.tokens_per_step}) must be a multiple of sequence_length "
                f"({self.sequence_length}), e.g. tokens_per_step={nearest}"
            )
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all micro-batches and ranks."""
        return self.tokens_per_step // self.sequence_length

    def micro_batch(self, world_size: int = 1) -> int:
        """Sequences of one forward pass on one rank: the largest divisor of a rank's share within `micro_batch_size`.

        Raises:
            ValueError: the sequences of a step cannot be shared evenly among the ranks.
        """
        if self.sequences_per_step % world_size:
            raise ValueError(f"{self.sequences_per_step} sequences a step cannot be shared by {world_size} ranks")
        share = self.sequences_per_step // world_size
        return max(size for size in range(1, min(self.micro_batch_size, share) + 1) if share % size == 0)
