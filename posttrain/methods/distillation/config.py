"""Settings of the `distill` stage; with `TrainingConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY
from posttrain.training.adapters import LoraSettings
from posttrain.training.checks import one_choice_of_weights, whole_sequences
from posttrain.training.config import TrainingConfig

ID_BYTES, LOGPROB_BYTES = 4, {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of a token's number and of a log-probability in the teacher's cache."""


class TeacherCache(BaseModel):
    """The teacher's most likely tokens, written once before training; training then never calls the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    top_k: int = Field(
        64, ge=1, description="Tokens kept at every position; the rest of the vocabulary becomes one bucket."
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16",
        description="Type of the kept log-probabilities. float16 is off by up to 0.4 % of a probability near e⁻¹⁰, "
        "bfloat16 by up to 3 %.",
    )

    @property
    def bytes_per_token(self) -> int:
        """Disk of one position: k token numbers, k log-probabilities and that of the rest."""
        return self.top_k * ID_BYTES + (self.top_k + 1) * LOGPROB_BYTES[self.dtype]


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
    teacher_sharding: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="With several ranks: the whole teacher on each, or its layers in shards that are gathered when "
        "they compute (torch's fully_shard, with any engine); slower, and its memory is divided by the ranks.",
        json_schema_extra=NOT_IN_KEY,
    )
    teacher_cache: TeacherCache | None = Field(
        None,
        description="Run the teacher once over the sequences of the run, keep its top_k log-probabilities on disk, and "
        "train on them and one bucket for the rest; forward_kl alone. null = the teacher computes at every step.",
    )
    trainable: Literal["all", "mixers"] = Field(
        "all", description="all parameters, or the token mixers (attention) alone with the rest frozen."
    )
    lora: LoraSettings | None = Field(
        None,
        description="Train low-rank adapters in place of the weights, and merge them in at the end; they want about "
        "ten times the lr. null = don't.",
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the saved weights. bfloat16 halves the folder and rounds small updates away: "
        "only for a last stage.",
    )

    _whole_sequences = model_validator(mode="after")(whole_sequences)
    _one_choice_of_weights = model_validator(mode="after")(one_choice_of_weights)

    @model_validator(mode="after")
    def _cache_has_what_the_divergence_needs(self) -> Self:
        if self.teacher_cache is not None and self.divergence != "forward_kl":
            raise ValueError(
                f"divergence={self.divergence} needs the teacher's probability of every token that the student may "
                "give, and teacher_cache keeps the teacher's likeliest alone: use divergence=forward_kl or "
                "teacher_cache=null"
            )
        return self

    @model_validator(mode="after")
    def _sharded_teacher_is_with_the_student(self) -> Self:
        if self.teacher_sharding == "sharded" and self.teacher_device != "same":
            raise ValueError(
                f"teacher_sharding=sharded keeps the teacher on the ranks' own devices, not on teacher_device="
                f"{self.teacher_device}: use teacher_device=same"
            )
        return self

    def key_fields(self) -> dict[str, Any]:
        """As every stage's; newer settings at their defaults are left out, so that earlier results keep their keys."""
        fields = super().key_fields()
        for name, before in (("packing", "stream"), ("teacher_cache", None), ("lora", None)):
            if fields[name] == before:
                del fields[name]
        return fields

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all micro-batches and ranks."""
        return self.tokens_per_step // self.sequence_length
