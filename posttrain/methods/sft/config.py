"""Settings of the `sft` stage; with `TrainingConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.training.adapters import LoraSettings
from posttrain.training.checks import no_graph_of_trl, one_choice_of_weights, whole_sequences
from posttrain.training.config import TrainingConfig


class SftConfig(TrainingConfig):
    """Train a model by next-token cross-entropy on conversations, on prompts with completions, or on plain text."""

    type: Literal["sft"] = "sft"

    lr: float = Field(2e-5, gt=0, description="Peak learning rate of AdamW; adapters want about ten times more.")
    tokens_per_step: int = Field(
        65_536,
        ge=1,
        description="Tokens of one optimiser step, padding included: sequence_length times the step's sequences.",
    )
    sequence_length: int = Field(
        2048,
        ge=2,
        description="Longest sequence, tokens. Longer conversations and prompts with completions lose their end, "
        "longer texts go on in further sequences.",
    )
    loss_on: Literal["assistant", "completion", "all"] = Field(
        "assistant",
        description="Tokens that are learnt. assistant: every assistant turn with the token that ends it; completion: "
        "what follows the prompt, in `messages` rows the last assistant turn; all: every token (plain text).",
    )
    packing: bool = Field(
        True,
        description="Put several documents into a sequence. None sees another: attention and positions start anew at "
        "each. Off: a document is a sequence, and padding takes the rest.",
    )
    trainable: Literal["all", "mixers"] = Field(
        "all", description="all parameters, or the token mixers (attention) alone with the rest frozen."
    )
    lora: LoraSettings | None = Field(
        None, description="Train low-rank adapters in place of the weights, and merge them in at the end; null = don't."
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the saved weights. bfloat16 halves the folder and rounds small updates away: "
        "only for a last stage.",
    )

    _whole_sequences = model_validator(mode="after")(whole_sequences)
    _one_choice_of_weights = model_validator(mode="after")(one_choice_of_weights)
    _no_graph = model_validator(mode="after")(no_graph_of_trl)

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all micro-batches and ranks."""
        return self.tokens_per_step // self.sequence_length
