"""Settings that every training stage has; the only place of their defaults, which a stage may state anew."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.pipeline.device import planned_strategy
from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig

COMPILE_PAYS_AFTER = 50
"""Optimiser steps from which `compile=auto` compiles: below, some 20 s of compilation are not won back."""

GIB = 2**30


class TrainingConfig(StageConfig):
    """What a stage that trains a model by gradients can be told, whatever its loss."""

    max_steps: int = Field(1000, ge=1, description="Optimiser steps.")
    micro_batch_size: int = Field(
        8,
        ge=1,
        description="Sequences of one forward pass, at most: the largest divisor of the sequences of a step is taken.",
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
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: fp32 weights and optimiser under bf16 autocast. Parameters are never bf16."
    )

    residual_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the residual stream with precision=bf16. bfloat16, as in models run wholly in bf16, takes "
        "less memory and time and rounds the sum after every layer.",
    )

    compile: Literal["auto", "layers", "off"] = Field(
        "auto",
        description="layers: each decoder layer is compiled, one graph for all layers of a kind, about 20 s at the "
        f"first step. auto: layers on a GPU from {COMPILE_PAYS_AFTER} steps, off on a CPU and with engine=zero3.",
        json_schema_extra=NOT_IN_KEY,
    )
    cuda_graph: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Replay forward, loss and backward of a micro-batch as one captured CUDA graph, so that launching "
        "kernels takes no time. auto: on one GPU, where batches have one shape and no random numbers are drawn; on: "
        "also on several that each hold the whole model (not run yet).",
        json_schema_extra=NOT_IN_KEY,
    )
    attention: Literal["auto", "cudnn", "flash", "efficient", "math"] = Field(
        "auto",
        description="torch's attention kernels on a GPU. auto: the fastest measured that can do the shape; another "
        "name: that one or an error.",
        json_schema_extra=NOT_IN_KEY,
    )
    activation_budget_gib: float | None = Field(
        None,
        gt=0,
        description="Recompute just as much as keeps a forward pass's activations within it; null = keep all. Compiled "
        "layers first give up what pointwise operations make again, which costs next to nothing; then feed-forward "
        "parts are recomputed, layer by layer, then whole layers.",
        json_schema_extra=NOT_IN_KEY,
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep one tensor a layer and compute the rest again: least memory, about a third slower.",
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

    hang_seconds: float = Field(
        1800.0,
        ge=0,
        description="A rank that makes no progress for so long is ended, with a file that says where it stood; "
        "0 = never.",
        json_schema_extra=NOT_IN_KEY,
    )

    @model_validator(mode="after")
    def _types_that_do_something(self) -> Self:
        for name in ("residual_dtype", "logits_dtype"):
            if getattr(self, name, "float32") == "bfloat16" and self.precision != "bf16":
                raise ValueError(
                    f"{name}=bfloat16 needs precision=bf16: with precision={self.precision} it does nothing"
                )
        return self

    @property
    def sequences_per_step(self) -> int:
        """Sequences of one optimiser step, over all micro-batches and ranks; every stage says how it counts them."""
        raise NotImplementedError

    @property
    def activation_budget(self) -> int | None:
        """`activation_budget_gib` in bytes."""
        return None if self.activation_budget_gib is None else int(self.activation_budget_gib * GIB)

    def micro_batch(self, world_size: int = 1) -> int:
        """Sequences of one forward pass on one rank: the largest divisor of a rank's share within `micro_batch_size`.

        Raises:
            ValueError: the sequences of a step cannot be shared evenly among the ranks.
        """
        if self.sequences_per_step % world_size:
            raise ValueError(f"{self.sequences_per_step} sequences a step cannot be shared by {world_size} ranks")
        share = self.sequences_per_step // world_size
        return max(size for size in range(1, min(self.micro_batch_size, share) + 1) if share % size == 0)

    def check_ranks(self, ranks: int) -> None:
        """Raises ValueError unless the sequences of a step can be shared evenly among the ranks."""
        self.micro_batch(ranks)

    def compiles(self, on_gpu: bool) -> bool:
        """Whether layers are compiled on that device, by the engine that is planned for."""
        pays = on_gpu and self.max_steps >= COMPILE_PAYS_AFTER and planned_strategy() != "zero3"
        return self.compile == "layers" or (self.compile == "auto" and pays)
