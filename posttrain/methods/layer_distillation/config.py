"""Settings of the `ild` stage; with `TrainingConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY
from posttrain.training.checks import whole_sequences
from posttrain.training.config import TrainingConfig


class IldConfig(TrainingConfig):
    """Train each layer of the student alone: from the teacher's hidden states to what its layer makes of them.

    Layers do not depend on each other, so they are trained one after the other within a step: gradients and activations
    of one layer exist at a time. With several ranks the layers are shared out, whatever the engine; the result is that
    of one rank.
    """

    type: Literal["ild"] = "ild"

    max_steps: int = Field(6900, ge=1, description="Optimiser steps of every layer.")
    lr: float = Field(2e-4, gt=0, description="Peak learning rate of AdamW.")
    tokens_per_step: int = Field(196_608, ge=1, description="Tokens of one optimiser step.")
    sequence_length: int = Field(2048, ge=2, description="Tokens of one sequence; documents are joined by EOS and cut.")
    micro_batch_size: int = Field(
        8, ge=1, description="Sequences of one pass through a layer, at most.", json_schema_extra=NOT_IN_KEY
    )
    max_grad_norm: float = Field(
        1.0, ge=0, description="The gradients of each layer are clipped to this L2 norm; 0 = no clipping."
    )
    loss: Literal["l2", "mse"] = Field(
        "l2",
        description="l2: mean over tokens of the norm, not squared, of the difference of mixer and layer outputs "
        "(released code). mse: mean of their squared differences (paper).",
    )
    trainable: Literal["mixer", "block", "all"] = Field(
        "block",
        description="mixer: the token mixers. block: also MLPs and norms of the layers (released code). all: also the "
        "final norm, behind which the last layer is compared. Embeddings and head get no gradient here.",
    )
    save_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the saved weights.")

    _whole_sequences = model_validator(mode="after")(whole_sequences)

    @model_validator(mode="after")
    def _settings_that_do_something(self) -> Self:
        without_use = {
            "cuda_graph": self.cuda_graph == "on",
            "gradient_checkpointing": self.gradient_checkpointing,
            "activation_budget_gib": self.activation_budget_gib is not None,
        }
        for name, given in without_use.items():
            if given:
                raise ValueError(
                    f"{name} has no use in ild, which keeps one layer's activations at a time: leave it out"
                )
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step."""
        return self.tokens_per_step // self.sequence_length

    def check_ranks(self, ranks: int) -> None:
        """Any number will do: layers are shared, not sequences; ranks beyond the layers have nothing to do."""
