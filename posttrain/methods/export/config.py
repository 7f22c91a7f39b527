"""Settings of the `export` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain.pipeline.stage import StageConfig


class ExportConfig(StageConfig):
    """In which layout a model is written, and for which loader."""

    type: Literal["export"] = "export"
    to: Literal["native", "deepseek_v3"] = Field(
        "native",
        description="native: the model as it is, with its code bundled (transformers only). deepseek_v3: stock "
        "DeepSeek-V3 classes, no custom code; refused where that would not be exact.",
    )
    loader: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="Who will load a deepseek_v3 export: transformers gives the latent norms eps 1e-6 whatever the "
        "config says, vllm (and SGLang) give them rms_norm_eps. The wrong one is off by the root of the ratio.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Data type of the written weights; null: as the input is stored."
    )
    pad_ranks: bool = Field(
        False, description="Pad per-layer ranks with zeros to the largest: exact, but the cache grows to it."
    )
    norm_scale_bits: int = Field(
        24,
        ge=16,
        le=40,
        description="s = 2^-bits of the epsilon-linearised norms; more bits for latents of large magnitude.",
    )
