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
    bytes_per_token: int | None = Field(
        default=None,
        gt=0,
        description="Cache bytes of one token over all layers, at 2 bytes an element (bf16). Excludes the others.",
    )
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Every layer gets the smallest rank that keeps this share of its spectrum. Excludes the others.",
    )
    energy_rule: Literal["at_least", "released"] = Field(
        default="at_least", description="released: as X-EcoMLA's code counts, one short before the rounding."
    )
    rank_allocation: Literal["uniform", "water_fill"] | None = Field(
        default=None,
        description="water_fill: the ranks of all layers share one budget, by what each layer loses. null: water_fill "
        "for bytes_per_token, uniform otherwise.",
    )
    rank_multiple: int = Field(
        default=16, gt=0, description="A rank that follows from kv_ratio is a multiple of this (kernels want 16)."
    )
    qk_rope_head_dim: int | None = Field(
        default=None,
        gt=0,
        description="Width d_r of the shared rotary key, even, at most head_dim. null: half of head_dim.",
    )
    rotary_plan: Literal["paired", "rorope", "xeco"] = Field(
        default="paired",
        description="paired: keep whole rotary pairs at the source's own frequencies. xeco: the published X-EcoMLA "
        "initialisation (last d_r rows of each head, mean key, unweighted SVD). rorope: TransMLA's, leading directions "
        "across KV heads and `freqfold` adjacent pairs. The last two fix the three settings after freqfold.",
    )
    freqfold: int | None = Field(
        default=None,
        gt=0,
        description="rorope: how many adjacent rotary pairs share one decomposition, a multiple of head_dim/d_r that "
        "divides head_dim/2. More gathers more energy but mixes frequencies. null: head_dim/d_r, the smallest.",
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
    latent_plan: Literal["bkv", "pca", "svd"] | None = Field(
        default=None,
        description="How the latent is found. svd: from the weights, keys and values as they are. pca: from "
        "calibration text, as they are. bkv: keys divided by α so that both weigh alike. null: bkv, for xeco svd.",
    )
    balance_ratio: float = Field(default=1.0, gt=0, description="bkv: multiplies the balancing α.")
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
        others = [name for name in ("kv_lora_rank", "kv_ratio", "bytes_per_token", "energy") if getattr(self, name)]
        if len(others) > 1 and others != ["kv_lora_rank", "kv_ratio"]:
            raise ValueError(f"give exactly one of {', '.join(others)}; set the others to null, e.g. {others[0]}=null")
        if self.energy is not None and self.rank_allocation is not None:
            raise ValueError("energy decides every layer's rank by itself: leave rank_allocation null")
        if self.kv_lora_rank is not None and self.kv_ratio is not None:
            raise ValueError(
                "give exactly one of kv_lora_rank and kv_ratio; set the other to null, e.g. "
                f"kv_ratio=null kv_lora_rank={self.kv_lora_rank}"
            )
        if not others:
            raise ValueError(
                "give one of kv_lora_rank and kv_ratio, or of bytes_per_token and energy, e.g. kv_ratio=0.25"
            )
        return self

    @model_validator(mode="after")
    def _xeco_is_fixed(self) -> MlaUpcycleConfig:
        if self.rotary_plan == "xeco":
            fixed = {"rotary_pairs": "uniform", "shared_key": "mean", "keep_residual": False, "objective": "weight"}
            fixed["latent_plan"] = "svd"
            wrong = [name for name, value in fixed.items() if getattr(self, name) not in (None, value)]
            if wrong:
                names = ", ".join(wrong)
                raise ValueError(f"rotary_plan=xeco fixes {names}: leave them null, or use rotary_plan=paired")
        return self

    @model_validator(mode="after")
    def _rorope_is_fixed(self) -> MlaUpcycleConfig:
        if self.rotary_plan != "rorope":
            if self.freqfold is not None:
                raise ValueError("freqfold belongs to rotary_plan=rorope: leave it null, or use that plan")
            return self
        fixed = {"rotary_pairs": "uniform", "shared_key": "principal", "keep_residual": True}
        wrong = [name for name, value in fixed.items() if getattr(self, name) not in (None, value)]
        if wrong:
            raise ValueError(f"rotary_plan=rorope fixes {', '.join(wrong)}: leave them null, or use rotary_plan=paired")
        return self

    @model_validator(mode="after")
    def _latent_plan_fits(self) -> MlaUpcycleConfig:
        if self.latent_kind == "svd" and self.objective not in (None, "weight"):
            raise ValueError(f"latent_plan=svd decomposes weights, objective={self.objective} needs pca or bkv")
        if self.latent_kind == "pca" and self.objective == "weight":
            raise ValueError("latent_plan=pca decomposes calibration text; with objective=weight use svd or bkv")
        if self.latent_kind != "bkv" and self.balance_ratio != 1:
            raise ValueError(f"balance_ratio belongs to latent_plan=bkv, not {self.latent_kind}: leave it out")
        return self

    @property
    def allocation(self) -> Literal["uniform", "water_fill"]:
        """`rank_allocation` with null resolved."""
        return self.rank_allocation or ("water_fill" if self.bytes_per_token is not None else "uniform")

    @property
    def latent_kind(self) -> Literal["bkv", "pca", "svd"]:
        """`latent_plan` with null resolved."""
        return self.latent_plan or ("svd" if self.rotary_plan == "xeco" else "bkv")

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
        if self.latent_kind == "svd":
            return "weight"
        return "activation" if calibrated or self.latent_kind == "pca" else "weight"
