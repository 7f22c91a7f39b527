"""The one table of sequence mixers. A new kind of layer is one entry here; the decoder does not change.

A mixer is a module built as `Mixer(config, layer_idx)` and called as

    forward(hidden_states, position_embeddings, attention_mask, padding_mask, position_ids, past_key_values, **kwargs)

with `hidden_states` [B, T, D]; it returns [B, T, D]. Masks it did not ask for are None; `documents` is given as a
keyword to mixers that ask for it, and to no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class MixerSpec:
    """How the decoder treats one kind of mixer.

    Attributes:
        load: returns the module class; called when a layer is built, so that a config needs no modelling code.
        masks: which masks it wants: "causal" (`attention_mask`, additive or boolean [B, 1, T, S], or None where the
            attention function is causal by itself), "padding" (`padding_mask`, [B, T], 1 for real tokens, aligned with
            `hidden_states`, or None where nothing is padded) and "documents" (`documents`, [B, T], the number of each
            token's document in a packed row, or None where every row is one; the causal mask knows them already).
        cache_layer: transformers' name of the cache layer it writes ("full_attention", "linear_attention", …).
        rotary: "source" (all d_h/2 frequencies of the source), "selected" (those of `rope_frequency_indices`), or None.
    """

    load: Callable[[], type]
    masks: tuple[str, ...]
    cache_layer: str
    rotary: str | None


def _full_attention() -> type:
    from .attention_upcycled import FullAttention

    return FullAttention


def _latent_attention() -> type:
    from .latent_upcycled import LatentAttention

    return LatentAttention


def _mamba2() -> type:
    from .mamba_upcycled import Mamba2

    return Mamba2


MIXERS: dict[str, MixerSpec] = {
    "full_attention": MixerSpec(_full_attention, ("causal",), "full_attention", "source"),
    "latent_attention": MixerSpec(_latent_attention, ("causal",), "full_attention", "selected"),
    "mamba2": MixerSpec(_mamba2, ("padding", "documents"), "linear_attention", None),
}
