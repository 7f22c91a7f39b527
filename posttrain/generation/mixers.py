"""The one table of mixers the decoder knows. A new mixer is one entry."""

from __future__ import annotations

from posttrain.generation.layers import FullAttention, LatentAttention, Mixer
from posttrain.generation.states import Mamba2

MIXERS: dict[str, type[Mixer]] = {
    "full_attention": FullAttention,
    "latent_attention": LatentAttention,
    "mamba2": Mamba2,
}
