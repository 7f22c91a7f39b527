"""Settings of the `distill` stage; with `TrainingConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY
from posttrain.training.config import TrainingConfig


class DistillConfig(TrainingConfig):
    """Train a student to give the frozen teacher's next-token distribution on plain text."""

    type: Literal["distill"] = "distill"

    tokens_per_step: int = Field(
        393_216,
        ge=1,
        description="Tokens of one optimiser step, over all micro-batches and ranks (packing=documents: padding too).",
    )
    sequence_length: int = Field(
        2048, ge=2, description="Tokens of one sequence, a row of the batch; what `packing` fills."
    )
    packing: Literal["stream", "documents"] = Field(
        "stream",
        description="stream: documents are joined by EOS and cut, attention crosses them (as in the papers). "
        "documents: whole ones, best fit, longer ones split; attention and positions start anew at each, padding is "
        "left out.",
    )
    chunk_tokens: int = Field(
        2048,
        ge=1,
        description="Tokens whose logits exist at a time in the loss, at most; lower it when memory is short.",
        json_schema_extra=NOT_IN_KEY,
    )
    logits_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the logits on a GPU with precision=bf16. bfloat16 is what an eager head gives and saves a "
        "few percent of a step; float32 does not round them. Elsewhere logits are float32.",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); jsd: the generalised "
        "Jensen-Shannon divergence of both to their mixture.",
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="Weight of the teacher in jsd's mixture; no use otherwise.")
    reduction: Literal["token_mean", "batch_sum"] = Field(
        "token_mean",
        description="Loss of a step: mean over tokens, or sum over tokens divided by sequences (X-EcoMLA's code; with "
        "clipping at 1 that is training by normalised gradients). The history always has the token mean as `kl`.",
    )
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="Divides both models' logits in the divergence; no T² factor."
    )
    ce_weight: float = Field(
        0.0, ge=0, le=1, description="Weight w of next-token cross-entropy: (1 - w) divergence + w CE."
    )
    teacher_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen teacher's weights; bfloat16 halves their memory."
    )
    teacher_device: str = Field(
        "same",
        pattern=r"^(same|cpu|cuda:\d+)$",
        description="Where the teacher computes: same (as the student), cpu, or cuda:N; hidden states are moved.",
        json_schema_extra=NOT_IN_KEY,
    )
    trainable: Literal["all", "mixers"] = Field(
        "all", description="all parameters, or the token mixers (attention) alone with the rest frozen."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the saved weights. bfloat16 halves the folder and rounds small updates away: "
        "only for a last stage.",
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

    def key_fields(self) -> dict[str, Any]:
        """As every stage's; the default packing is left out, so that earlier results keep their keys."""
        fields = super().key_fields()
        if self.packing == "stream":
            del fields["packing"]
        return fields

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all micro-batches and ranks."""
        return self.tokens_per_step // self.sequence_length
