"""Settings of the `mla_upcycle` stage. The defaults are measured or argued for in docs/mla_upcycling.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from posttrain.pipeline.stage import StageConfig


class MlaUpcycleConfig(StageConfig):
    """How attention is turned into latent attention. Give exactly one of `kv_lora_rank` and `kv_ratio`."""

    type: Literal["mla_upcycle"] = "mla_upcycle"
    kv_lora_rank: int | None = Field(
        default=None,
        gt=0,
        description="Latent width r of every layer, in elements cached per token. Excludes kv_ratio.",
    )
    kv_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Cache size as a share of the source's: (r + d_r) / (2 · KV heads · head_dim). r is rounded down "
        "to `rank_multiple`; the plan shows the real ratio. Excludes kv_lora_rank.",
    )
    rank_multiple: int = Field(
        default=16, gt=0, description="A rank that follows from kv_ratio is a multiple of this (kernels want 16)."
    )
    qk_rope_head_dim: int | None = Field(
        default=None,
        gt=0,
        description="Width d_r of the shared rotary key, even, at most head_dim. null: half of head_dim.",
    )
    rotary_plan: Literal["paired", "xeco"] = Field(
        default="paired",
        description="paired: keep whole rotary pairs at the source's own frequencies. xeco: the published X-EcoMLA "
        "initialisation (last d_r rows of each head, mean key, unweighted SVD); it fixes the four settings below.",
    )
    rotary_pairs: Literal["fastest", "uniform"] | None = Field(
        default=None,
        description="Which d_r/2 of a head's rotary pairs keep their rotation. fastest: those of highest frequency. "
        "uniform: evenly spread (every (head_dim/d_r)-th). null: fastest for paired, uniform for xeco.",
    )
    shared_key: Literal["principal", "mean"] | None = Field(
        default=None,
        description="How the KV heads become one rotary key. principal: for each pair the leading direction across "
        "heads (RoRoPE). mean: their average. null: principal for paired, mean for xeco.",
    )
    keep_residual: bool | None = Field(
        default=None,
        description="true: what the rotary key does not carry stays in the position-free key (qk_nope_head_dim = "
        "head_dim, TransMLA). false: it is dropped (qk_nope_head_dim = head_dim − d_r). null: true for paired, "
        "false for xeco.",
    )
    objective: Literal["activation", "attention", "weight"] | None = Field(
        default=None,
        description="What the latent preserves. activation: keys and values on calibration text, balanced. attention: "
        "the same, weighted by the queries and the output projection. weight: the weights, no data needed. null: "
        "activation with a calibration input, weight without; always weight for xeco.",
    )
    calibration_tokens: int = Field(
        default=32_768, gt=0, description="Tokens of calibration text, if that much is there."
    )
    calibration_sequence_length: int = Field(default=256, gt=1, description="Tokens per calibration sequence.")

    @model_validator(mode="after")
    def _one_budget(self) -> MlaUpcycleConfig:
        if self.kv_lora_rank is not None and self.kv_ratio is not None:
            raise ValueError(
                "give exactly one of kv_lora_rank and kv_ratio; set the other to null, e.g. "
                f"kv_ratio=null kv_lora_rank={self.kv_lora_rank}"
            )
        if self.kv_lora_rank is None and self.kv_ratio is None:
            raise ValueError("give one of kv_lora_rank and kv_ratio, e.g. kv_ratio=0.25")
        return self

    @model_validator(mode="after")
    def _xeco_is_fixed(self) -> MlaUpcycleConfig:
        if self.rotary_plan == "xeco":
            fixed = {"rotary_pairs": "uniform", "shared_key": "mean", "keep_residual": False, "objective": "weight"}
            wrong = [name for name, value in fixed.items() if getattr(self, name) not in (None, value)]
            if wrong:
                names = ", ".join(wrong)
                raise ValueError(f"rotary_plan=xeco fixes {names}: leave them null, or use rotary_plan=paired")
        return self

    @property
    def pairs(self) -> Literal["fastest", "uniform"]:
        """`rotary_pairs` with null resolved."""
        return self.rotary_pairs or ("uniform" if self.rotary_plan == "xeco" else "fastest")

    @property
    def key_kind(self) -> Literal["principal", "mean"]:
        """`shared_key` with null resolved."""
        return self.shared_key or ("mean" if self.rotary_plan == "xeco" else "principal")

    @property
    def residual_kept(self) -> bool:
        """`keep_residual` with null resolved."""
        return self.keep_residual if self.keep_residual is not None else self.rotary_plan != "xeco"

    def objective_for(self, calibrated: bool) -> Literal["activation", "attention", "weight"]:
        """`objective` with null resolved, given whether calibration statistics are there."""
        if self.objective is not None:
            return self.objective
        return "activation" if calibrated and self.rotary_plan != "xeco" else "weight"
