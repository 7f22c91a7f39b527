"""Settings of the `export` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.pipeline.stage import StageConfig


class ExportConfig(StageConfig):
    """In which layout a model is written, and for which loader."""

    type: Literal["export"] = "export"
    to: Literal["native", "deepseek_v3", "falcon_h1"] = Field(
        "native",
        description="native: the model as it is, with its code bundled (transformers only). deepseek_v3, falcon_h1: "
        "stock DeepSeek-V3 classes for latent attention everywhere, stock FalconH1 classes for hybrids of states and "
        "full attention, no custom code; refused where that would not be exact.",
    )
    loader: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="Who will load a deepseek_v3 export: transformers gives the latent norms eps 1e-6 whatever the "
        "config says, vllm (and SGLang) give them rms_norm_eps and know rope_type default only. The wrong one is off "
        "by the root of the ratio.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Data type of the written weights; null: as the input is stored."
    )
    pad_ranks: bool = Field(
        False, description="Pad per-layer ranks with zeros to the largest: exact, but the cache grows to it."
    )
    norm_scale_bits: int | None = Field(
        None,
        ge=8,
        le=64,
        description="s = 2^-bits of the epsilon-linearised norms. null: as many as make each norm a constant to fp32 "
        "rounding for every input, from a bound on the latents that follows from the weights.",
    )
    max_documents: int = Field(8, gt=0, description="Documents of the input `data` that are measured.")
    max_tokens: int = Field(512, gt=1, description="Tokens of each of those documents that are measured.")
