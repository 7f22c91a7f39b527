"""Settings of the hybrid's stages, and what they mean for the model's configuration; without torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from posttrain.pipeline.stage import NOT_IN_KEY, StageConfig

Init = Literal["published", "aligned"]
Method = Literal["smart", "uniform", "greedy_kl", "budget"]


class MambaSettings(BaseModel):
    """Form and start of `mamba2` layers that are made from attention."""

    init: Init = Field(
        default="published",
        description="published: attention's queries, keys, values and output projection become C, B, x and output; "
        "gate, step sizes, decays and convolution are random (Zebra-Llama). aligned: what is not attention starts "
        "neutral (convolution passes the last token, gate one, no norm, no skip) and each head forgets at the pace of "
        "its mean attention distance; needs statistics.",
    )
    conv_kernel: int = Field(default=4, ge=1, description="Tokens that the convolution spans.")
    repeat_before_conv: bool = Field(
        default=False,
        description="Repeat shared x and B to all heads before the convolution, which then has taps for each: more "
        "parameters and a larger convolution state. false: after it.",
    )

    def config_fields(self) -> dict[str, Any]:
        """Fields of `UpcycledConfig` that these settings decide."""
        aligned = self.init == "aligned"
        return {
            "mamba_conv_kernel": self.conv_kernel,
            "mamba_repeat_before_conv": self.repeat_before_conv,
            "mamba_conv_activation": not aligned,
            "mamba_norm": not aligned,
            **({"mamba_bias": True} if aligned else {}),
        }


class HybridConfig(MambaSettings):
    """What `hybridize` is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, description="Of random parts; a layer's do not depend on which others convert.")


class HybridInitConfig(MambaSettings, StageConfig):
    """Replace attention layers by state-space layers that start from their weights."""

    type: Literal["hybrid_init"] = "hybrid_init"

    keep: list[int] | None = Field(
        None, description="Layers that stay as they are, counted from 0; null with keep_every null = none stays."
    )
    keep_every: int | None = Field(
        None, ge=1, description="Every N-th layer stays, the N-th first: 2 keeps layers 1, 3, 5, … (MambaInLlama)."
    )
    statistics_tokens: int = Field(
        32_768, ge=1, description="init=aligned: tokens over which attention distances are averaged."
    )
    statistics_sequence_length: int = Field(
        512, ge=2, description="init=aligned: tokens of a sequence; heads that look further back count as this far."
    )

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.keep is not None and self.keep_every is not None:
            raise ValueError(
                "keep and keep_every both choose the layers that stay: write keep_every=null to use keep, or keep=null"
            )
        if self.keep is not None and sorted(set(self.keep)) != self.keep:
            raise ValueError(f"keep must name layers once each, in order, e.g. keep={sorted(set(self.keep))}")
        return self

    @model_validator(mode="after")
    def _a_whole_sequence(self) -> Self:
        if self.init == "aligned" and self.statistics_tokens < self.statistics_sequence_length:
            raise ValueError(
                f"statistics_tokens ({self.statistics_tokens}) is less than one statistics_sequence_length "
                f"({self.statistics_sequence_length})"
            )
        return self

    def kept(self, layers: int) -> list[int]:
        """Indices of the layers that stay, of a model with so many."""
        if self.keep_every is not None:
            return list(range(self.keep_every - 1, layers, self.keep_every))
        return list(self.keep or [])


class LayerSelectConfig(StageConfig):
    """Choose which layers stay attention, by how much the hybrid gains from each."""

    type: Literal["layer_select"] = "layer_select"

    method: Method = Field(
        "smart",
        description="smart: evenly spread, best at both ends (Zebra-Llama). uniform: every (L/N)-th, nothing is "
        "measured. greedy_kl: one after the other, measured again after each. budget: the best whose cache fits.",
    )
    n_keep: int | None = Field(None, ge=1, description="Layers that stay attention; or give keep_fraction.")
    keep_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of the layers that stays attention, rounded to whole layers, at least one."
    )
    cache_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="method=budget: cache of the hybrid relative to the teacher's at cache_tokens tokens, constant "
        "states included, at most.",
    )
    cache_tokens: int = Field(8192, ge=1, description="method=budget: length at which the cache is counted.")
    tokens: int = Field(65_536, ge=1, description="Tokens of text on which the divergence is measured.")
    sequence_length: int = Field(2048, ge=2, description="Tokens of one sequence of it.")
    micro_batch_size: int = Field(
        4, ge=1, description="Sequences of one pass through a layer.", json_schema_extra=NOT_IN_KEY
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: under autocast.")

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = [name for name in ("n_keep", "keep_fraction", "cache_ratio") if getattr(self, name) is not None]
        wanted = ("cache_ratio",) if self.method == "budget" else ("n_keep", "keep_fraction")
        if len(given) != 1 or given[0] not in wanted:
            said = f"{' and '.join(given)} given" if given else "none given"
            used = next((name for name in reversed(given) if name in wanted), None)
            words = [f"{name}=null" for name in given if name != used] + ([] if used else [f"{wanted[0]}=…"])
            fix = " ".join(words)
            raise ValueError(f"method={self.method} takes exactly one of {', '.join(wanted)} ({said}): write {fix}")
        return self

    @model_validator(mode="after")
    def _a_whole_sequence(self) -> Self:
        if self.tokens < self.sequence_length:
            raise ValueError(f"tokens ({self.tokens}) is less than one sequence_length ({self.sequence_length})")
        return self

    def count(self, layers: int) -> int | None:
        """N, the number of layers to keep of a model with so many; None for `budget`."""
        if self.keep_fraction is not None:
            return max(1, round(self.keep_fraction * layers))
        return self.n_keep


class AssembleConfig(StageConfig):
    """Put a hybrid together from two models of one source, each layer from the one that has its kind."""

    type: Literal["assemble"] = "assemble"

    keep: list[int] | None = Field(
        None, description="Layers taken from the attention model, counted from 0; null = those of inputs.selection."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.keep is not None and sorted(set(self.keep)) != self.keep:
            raise ValueError(f"keep must name layers once each, in order, e.g. keep={sorted(set(self.keep))}")
        return self
