"""How state-space layers are made from attention."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Init = Literal["published", "aligned"]


class HybridConfig(BaseModel):
    """Form and start of the `mamba2` layers of a hybrid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    init: Init = Field(
        default="published",
        description="published: attention's queries, keys, values and output projection become C, B, x and output; "
        "gate, step sizes, decays and convolution are random (Zebra-Llama). aligned: what is not attention starts "
        "neutral (convolution passes the last token, gate one, no norm, no skip) and each head forgets at the pace of "
        "its mean attention distance; needs statistics. Whether it trains better is not measured yet.",
    )
    conv_kernel: int = Field(default=4, ge=1, description="Tokens that the convolution spans.")
    repeat_before_conv: bool = Field(
        default=False,
        description="Repeat shared x and B to all heads before the convolution, which then has taps for each: more "
        "parameters and a larger convolution state. false: after it.",
    )
    seed: int = Field(default=0, ge=0, description="Of random parts; a layer's do not depend on which others convert.")
