"""Settings of the `preference` stage; with `TrainingConfig` the only place of its defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY
from posttrain.training.adapters import LoraSettings
from posttrain.training.checks import no_graph_of_trl, one_choice_of_weights
from posttrain.training.config import TrainingConfig

Loss = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"]

Metric = Literal["pair_accuracy", "pair_margin", "perplexity"]


class PreferenceConfig(TrainingConfig):
    """Train a model to prefer the chosen answer over the rejected one (DPO), and keep it only if it is better."""

    type: Literal["preference"] = "preference"

    lr: float = Field(5e-7, gt=0, description="Peak learning rate of AdamW; adapters want about ten times more.")
    warmup_ratio: float = Field(
        0.1, ge=0, lt=1, description="Share of max_steps in which the rate rises from 0, rounded up to whole steps."
    )
    pairs_per_step: int = Field(32, ge=1, description="Preference pairs of one optimiser step.")
    micro_batch_size: int = Field(
        4,
        ge=1,
        description="Pairs of one forward pass, each two sequences, at most: the largest divisor of the pairs of a "
        "step is taken.",
        json_schema_extra=NOT_IN_KEY,
    )
    sequence_length: int = Field(
        1024, ge=2, description="Longest prompt with an answer, tokens; longer ones lose their end."
    )
    loss_type: Loss = Field(
        "sigmoid",
        description="TRL's loss of a pair. sigmoid: DPO; hinge: of SLiC; ipo: of arXiv:2310.12036, per token; robust: "
        "DPO with labels that may be wrong, see label_smoothing; sigmoid_norm: DPO of the means per token; apo_zero: "
        "raises the chosen and lowers the rejected answer each for itself.",
    )
    beta: float = Field(
        0.01, gt=0, description="Weight of the distance to the input model: larger stays nearer. For ipo its tau."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs whose order is taken to be wrong; for loss_type=robust only."
    )
    precompute_reference: bool = Field(
        False,
        description="Compute the input model's log-probabilities of all pairs once, before training, and keep no "
        "second copy of it in memory. With adapters there is none anyway.",
        json_schema_extra=NOT_IN_KEY,
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

    keep: Literal["better", "trained"] = Field(
        "better",
        description="better: the output is the trained model only if it is better than the input model on held-out "
        "data (gate_metric), else the input model's weights; trained: the trained model in any case.",
    )
    gate_metric: Metric = Field(
        "pair_accuracy",
        description="What better means. pair_accuracy: more held-out pairs whose chosen answer is likelier per token; "
        "where equal, pair_margin decides. pair_margin: larger mean difference of log-probability per token. "
        "perplexity: lower on `gate_text`.",
    )
    gate_max_perplexity_increase: float = Field(
        0.02,
        ge=0,
        description="With `gate_text`: a model whose perplexity rises by more than this share is not better.",
    )
    gate_pairs: int = Field(512, ge=1, description="Held-out pairs that are scored, the first ones, at most.")
    gate_documents: int = Field(64, ge=1, description="Documents of `gate_text` that are scored, at most.")

    @model_validator(mode="after")
    def _smoothing_that_does_something(self) -> Self:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(f"label_smoothing does nothing with loss_type={self.loss_type}: loss_type=robust uses it")
        return self

    _one_choice_of_weights = model_validator(mode="after")(one_choice_of_weights)
    _no_graph = model_validator(mode="after")(no_graph_of_trl)

    @property
    def sequences_per_step(self) -> int:
        """Pairs of one optimiser step: what a micro-batch counts."""
        return self.pairs_per_step
