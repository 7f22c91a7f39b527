"""Settings of the `mla_upcycle` stage. The defaults are measured or argued for in docs/mla_upcycling.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.methods.mla_upcycling.presets import BUDGETS, fill
from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig

RotaryPlan = Literal["paired", "rorope", "xeco", "lossless"]
Preset = Literal["activation_aware", "x_ecomla_paper", "x_ecomla_released", "transmla"]

_FIXED: dict[str, dict[str, Any]] = {
    "paired": {},
    "rorope": {"rotary_pairs": "uniform", "shared_key": "principal", "keep_residual": True},
    "xeco": {
        "rotary_pairs": "uniform",
        "shared_key": "mean",
        "keep_residual": False,
        "objective": "weight",
        "latent_plan": "svd",
    },
    "lossless": {"shared_key": "principal", "keep_residual": False},
}
"""What follows from a rotary plan and cannot be set beside it."""
_OF_PAIRED = ("rotary_pairs", "shared_key", "keep_residual")
_HOW_ONLY = ("type", "inputs", "plan", "offload")


class MlaUpcycleConfig(StageConfig):
    """How attention is turned into latent attention. Give exactly one of `kv_lora_rank` and `kv_ratio`.

    Nothing of the kind is given where a saved plan is replayed (`plan`, or the input `conversion`), and the budget may
    be left out with `rotary_plan=lossless`.
    """

    type: Literal["mla_upcycle"] = "mla_upcycle"
    preset: Preset | None = Field(
        default=None,
        description="Settings in one word, for those not given here. activation_aware: errors weighted by queries and "
        "output projection, ranks water-filled; the best we measured at a sixth of the cache after long training. "
        "x_ecomla_paper: xeco, energy 0.95 unless another budget is given. x_ecomla_released: the same as its code "
        "does it (one short, multiples of 8, YaRN). transmla: rorope, freqfold=search, bkv, activations of 128 x 256 "
        "tokens.",
    )
    plan: str | None = Field(
        default=None,
        json_schema_extra=NOT_IN_KEY,
        description="Folder of a saved conversion (`conversion` of another run) whose plan is carried out again, "
        "instead of making one. The input `conversion` does the same within a recipe. Excludes every other setting.",
    )
    offload: Literal["auto", "never", "layers"] = Field(
        default="auto",
        json_schema_extra=NOT_IN_KEY,
        description="layers: one decoder layer in memory at a time, the rest stays on disk; the same result, for "
        "models larger than memory. auto: where the conversion would not fit otherwise.",
    )
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
        description="Width d_r of the shared rotary key, even, at most head_dim. null: for rorope a quarter of "
        "head_dim if that is even, half for other plans and preset=transmla; lossless: KV heads · head_dim, the only "
        "possible.",
    )
    rotary_plan: RotaryPlan = Field(
        default="rorope",
        description="null: paired if one of rotary_pairs, shared_key and keep_residual is given, which are its own, "
        "else rorope. paired: keep whole rotary pairs at the source's own frequencies. xeco: the published X-EcoMLA "
        "initialisation (last d_r rows of each head, mean key, unweighted SVD). rorope: TransMLA's, leading directions "
        "across KV heads and `freqfold` adjacent pairs. lossless: every component stays rotary (d_r = KV heads · "
        "head_dim), the latent holds values only; exact without a budget, and no smaller. The last three fix the three "
        "settings after freqfold.",
    )
    freqfold: Annotated[int, Field(gt=0)] | Literal["search"] | None = Field(
        default=None,
        description="rorope: how many adjacent rotary pairs share one decomposition, a multiple of head_dim/d_r that "
        "divides head_dim/2. More gathers more energy but mixes frequencies. search: per layer the one of head_dim/d_r "
        "times 1, 2, 4, … with the smallest error of attention scores. null: head_dim/d_r, the smallest.",
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
    rotary_scaling: Literal["source", "yarn"] = Field(
        default="source",
        description="source: the rotary key turns with frequencies of the source, scaled as there (llama3 too). "
        "yarn: xeco only; a scaling of the source is replaced by YaRN, as in the released code, which also multiplies "
        "rotary scores by (0.1 ln factor + 1)².",
    )
    yarn_factor: float | None = Field(
        default=None, gt=1, description="rotary_scaling=yarn: its factor. null: the factor of the source's scaling."
    )
    yarn_original_max_position_embeddings: int | None = Field(
        default=None,
        gt=0,
        description="rotary_scaling=yarn: context before the scaling. 4096: standalone X-EcoMLA. null: the source's.",
    )
    q_lora_rank: int | None = Field(
        default=None,
        gt=0,
        description="Rank of the query projection: its leading directions under the objective (xeco: SVD of the "
        "weights). Saves parameters, never cache. null: the full projection.",
    )
    end_layer_rank: int | None = Field(
        default=None,
        gt=0,
        description="energy: rank of the first and the last layer whatever their spectra, as X-EcoMLA's code pins them "
        "(use_fixed_rank_for_first_and_last_block). null: as the others.",
    )
    calibration_tokens: int = Field(
        default=32_768, gt=0, description="Tokens of calibration text, if that much is there."
    )
    calibration_sequence_length: int = Field(default=256, gt=1, description="Tokens per calibration sequence.")

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        data = fill(data)
        if isinstance(data, Mapping) and data.get("rotary_plan") is None:
            own = any(data.get(name) is not None for name in _OF_PAIRED)
            return {**data, "rotary_plan": "paired" if own else "rorope"}
        return data

    @model_validator(mode="after")
    def _one_budget(self) -> MlaUpcycleConfig:
        others = [name for name in BUDGETS if getattr(self, name)]
        if self.replays:
            return self
        if len(others) > 1 and others != ["kv_lora_rank", "kv_ratio"]:
            raise ValueError(f"give exactly one of {', '.join(others)}; set the others to null, e.g. {others[0]}=null")
        if self.energy is not None and self.rank_allocation is not None:
            raise ValueError("energy decides every layer's rank by itself: leave rank_allocation null")
        if self.energy is None and self.end_layer_rank is not None:
            raise ValueError("end_layer_rank belongs to energy, where ranks follow from the spectra: leave it null")
        if self.kv_lora_rank is not None and self.kv_ratio is not None:
            raise ValueError(
                "give exactly one of kv_lora_rank and kv_ratio; set the other to null, e.g. "
                f"kv_ratio=null kv_lora_rank={self.kv_lora_rank}"
            )
        if not others and self.rotary_plan != "lossless":
            raise ValueError(
                "give one of kv_lora_rank and kv_ratio, or of bytes_per_token and energy, e.g. kv_ratio=0.25"
            )
        return self

    @model_validator(mode="after")
    def _a_replayed_plan_decides(self) -> MlaUpcycleConfig:
        if not self.replays:
            return self
        if self.plan is not None and "conversion" in self.inputs:
            raise ValueError("give plan or inputs.conversion, not both")
        fields = type(self).model_fields.items()
        given = [name for name, info in fields if name not in _HOW_ONLY and getattr(self, name) != info.default]
        if given:
            nulls = " ".join(f"{name}=null" for name in given if type(self).model_fields[name].default is None)
            raise ValueError(
                f"a replayed plan decides everything: leave out {', '.join(given)}" + (f", e.g. {nulls}" * bool(nulls))
            )
        return self

    @model_validator(mode="after")
    def _rotary_plan_is_fixed(self) -> MlaUpcycleConfig:
        plan = self.rotary_plan
        wrong = [name for name, value in _FIXED[plan].items() if getattr(self, name) not in (None, value)]
        if plan == "lossless" and self.rotary_pairs is not None:
            wrong.insert(0, "rotary_pairs")
        if wrong:
            raise ValueError(f"rotary_plan={plan} fixes {', '.join(wrong)}: leave them null, or use rotary_plan=paired")
        if plan != "rorope" and self.freqfold is not None:
            raise ValueError("freqfold belongs to rotary_plan=rorope: leave it null, or use that plan")
        return self

    @model_validator(mode="after")
    def _yarn_is_published_for_xeco(self) -> MlaUpcycleConfig:
        if self.rotary_scaling == "yarn" and self.rotary_plan != "xeco":
            raise ValueError(
                f"rotary_scaling=yarn belongs to rotary_plan=xeco: {self.rotary_plan} turns with the source's own "
                "frequencies; leave it out"
            )
        given = [
            name for name in ("yarn_factor", "yarn_original_max_position_embeddings") if getattr(self, name) is not None
        ]
        if given and self.rotary_scaling != "yarn":
            raise ValueError(f"{given[0]} belongs to rotary_scaling=yarn: leave it null")
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
    def replays(self) -> bool:
        """Whether a saved plan is carried out again."""
        return self.plan is not None or "conversion" in self.inputs

    @property
    def plan_folder(self) -> Path | None:
        """The folder that `plan` names, absolute; its content, not its name, enters the key."""
        return None if self.plan is None else Path(self.plan).expanduser().resolve()

    @property
    def allocation(self) -> Literal["uniform", "water_fill"]:
        """`rank_allocation` with null resolved."""
        return self.rank_allocation or ("water_fill" if self.bytes_per_token is not None else "uniform")

    @property
    def planning_passes(self) -> int:
        """How often all layers are decomposed for a plan: twice where ranks follow from spectra."""
        return 0 if self.replays else 1 + (self.energy is not None or self.allocation == "water_fill")

    @property
    def latent_kind(self) -> Literal["bkv", "pca", "svd"]:
        """`latent_plan` with null resolved."""
        return self.latent_plan or ("svd" if self.rotary_plan == "xeco" else "bkv")

    def usual_rope_dim(self, head_dim: int) -> int:
        """`qk_rope_head_dim` with null resolved, for all plans but lossless."""
        narrow = self.rotary_plan == "rorope" and self.preset != "transmla" and head_dim % 8 == 0
        return head_dim // 4 if narrow else 2 * (head_dim // 4)

    @property
    def pairs(self) -> Literal["fastest", "uniform"]:
        """`rotary_pairs` with null resolved."""
        return self.rotary_pairs or ("fastest" if self.rotary_plan == "paired" else "uniform")

    @property
    def key_kind(self) -> Literal["principal", "mean"]:
        """`shared_key` with null resolved."""
        return self.shared_key or ("mean" if self.rotary_plan == "xeco" else "principal")

    @property
    def residual_kept(self) -> bool:
        """`keep_residual` with null resolved."""
        return self.keep_residual if self.keep_residual is not None else self.rotary_plan in ("paired", "rorope")

    def objective_for(self, calibrated: bool) -> Literal["activation", "attention", "weight"]:
        """`objective` with null resolved, given whether calibration statistics are there."""
        if self.objective is not None:
            return self.objective
        if self.latent_kind == "svd":
            return "weight"
        return "activation" if calibrated or self.latent_kind == "pca" else "weight"
