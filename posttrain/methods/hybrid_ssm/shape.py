"""Architectures of hybrids before they exist, and which layers can become which; without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.errors import RecipeError
from posttrain.models.architecture import MIXERS, mixers, normalise

Architecture = Mapping[str, Any]
LATENT_FIELDS = (
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_frequency_indices",
    "latent_rope_parameters",
    "query_pre_attn_scalar",
    "latent_bias",
    "latent_out_bias",
    "qk_latent_layernorm",
)
MAMBA_FIELDS = (
    "mamba_conv_kernel",
    "mamba_conv_activation",
    "mamba_norm",
    "mamba_repeat_before_conv",
    "mamba_bias",
    "mamba_out_bias",
)
OF_ALL_LAYERS = (
    "source_model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "qk_norm",
)
"""What models must have alike for a hybrid to take layers from both."""


def hybrid_architecture(
    source: Architecture, layer_types: Sequence[str], fields: Mapping[str, Any], latent: Architecture | None = None
) -> dict[str, Any]:
    """The architecture dict of a conversion of that model: `fields` of its new state-space layers, `latent` layers of
    another conversion."""
    family = source.get("source_model_type") or source["model_type"]
    taken = {} if latent is None else {name: latent[name] for name in LATENT_FIELDS if name in latent}
    upcycled = {"model_type": "upcycled", "source_model_type": family, "mixers": list(layer_types)}
    return normalise({**source, **upcycled, **fields, **taken})


def assembled_architecture(state: Architecture, attention: Architecture, kept: Sequence[int]) -> dict[str, Any]:
    """The architecture dict of the hybrid of two models of one source."""
    fields = {name: state[name] for name in MAMBA_FIELDS}
    latent = attention if "latent_attention" in mixers(attention) else None
    return hybrid_architecture(attention, assembled_mixers(attention, kept), fields, latent)


def assembled_mixers(attention: Architecture, kept: Sequence[int]) -> list[str]:
    """Mixer of every layer: the attention model's where it is kept, else a state-space layer."""
    return [kind if index in set(kept) else "mamba2" for index, kind in enumerate(mixers(attention))]


def check_layers(source: Architecture, layer_types: Sequence[str], donated: Sequence[str] | None) -> None:
    """Raises RecipeError unless the source, or a conversion of it with layers `donated`, can become these layers."""
    layers, kinds = source["num_hidden_layers"], mixers(source)
    if len(layer_types) != layers or (unknown := sorted(set(layer_types) - set(MIXERS))):
        wrong = f"{len(layer_types)} layer types for {layers} layers" if len(layer_types) != layers else str(unknown)
        raise RecipeError(
            f"layer_types do not fit the model: {wrong}",
            where="layer_types",
            fix=f"name one of {', '.join(MIXERS)} for each of {layers} layers",
        )
    donated = donated or [""] * layers
    for index, (old, new) in enumerate(zip(kinds, layer_types, strict=True)):
        if new == old or (new == "mamba2" and old == "full_attention"):
            continue
        if new == "latent_attention" and donated[index] == "latent_attention":
            continue
        fix = {
            "mamba2": "start from the model before its conversion: queries, keys and values are needed",
            "latent_attention": "give `latent_from`, the same model converted by mla_upcycling.upcycle",
            "full_attention": "start from the model before its conversion",
        }[new]
        raise RecipeError(f"layer {index} is {old}: it cannot become {new}", where=f"layer_types[{index}]", fix=fix)


def check_donated(source: Architecture, layer_types: Sequence[str], latent: Architecture, where: str) -> None:
    """Raises RecipeError unless layers of `latent`, a conversion of that source, can stand in its hybrid."""
    ours, theirs = (_family(arch) for arch in (source, latent))
    _check_alike(ours, theirs, where)
    kept = [new == old == "latent_attention" for new, old in zip(layer_types, mixers(source), strict=True)]
    unlike = [name for name in LATENT_FIELDS if source.get(name) != latent.get(name)]
    if any(kept) and unlike:
        raise RecipeError(
            f"the source's latent attention and that of `latent` differ in {', '.join(unlike)}: one model has one form",
            where=where,
            fix="leave `latent` out, or convert from the source before its conversion",
        )


def check_form(source: Architecture, layer_types: Sequence[str], form: Mapping[str, Any], where: str) -> None:
    """Raises RecipeError where the source has state-space layers of another form than new ones would have."""
    if not any(new == old == "mamba2" for new, old in zip(layer_types, mixers(source), strict=True)):
        return
    theirs = {name: source[name] for name in form}
    if theirs != dict(form):
        raise RecipeError(
            f"the source's mamba2 layers have another form ({theirs}) than new ones would ({dict(form)})",
            where=where,
            fix="convert all layers at once from the attention model",
        )


def check_tokenizers(digests: Mapping[str, str | None], where: str) -> None:
    """Raises RecipeError where known tokenizers of models that are to be one, or compared, differ."""
    known = {name: digest for name, digest in digests.items() if digest}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} {digest[:12]}" for name, digest in known.items())
        fix = "take all from one source"
        raise RecipeError(f"the models have different tokenizers (digests: {said})", where=where, fix=fix)


def check_kept(kept: Sequence[int], layers: int, where: str) -> None:
    """Raises RecipeError unless every index is one of the model's layers."""
    wrong = [index for index in kept if not 0 <= index < layers]
    if wrong:
        what = f"layer {wrong[0]} is kept, but the model has layers 0 to {layers - 1}"
        raise RecipeError(what, where=where, fix=f"name layers from 0 to {layers - 1}")


def check_donors(state: Architecture, attention: Architecture, where: str) -> None:
    """Raises RecipeError unless the two are all-state and all-attention conversions of one source."""
    if set(mixers(state)) != {"mamba2"}:
        found = sorted(set(mixers(state)) - {"mamba2"})
        what = f"`state` must have state-space layers everywhere, and has {', '.join(found)}"
        raise RecipeError(what, where=where, fix="give the model of a hybrid_init stage that keeps no layer")
    if "mamba2" in mixers(attention):
        what = "`attention` must have attention everywhere, and has mamba2 layers"
        raise RecipeError(what, where=where, fix="give the source, or its conversion by mla_upcycle")
    _check_alike(state, _family(attention), where)


def _family(arch: Architecture) -> dict[str, Any]:
    return {**arch, "source_model_type": arch.get("source_model_type") or arch["model_type"]}


def _check_alike(one: Architecture, other: Architecture, where: str) -> None:
    unlike = [
        f"{name} {one.get(name)} and {other.get(name)}" for name in OF_ALL_LAYERS if one.get(name) != other.get(name)
    ]
    if unlike:
        fix = "convert both from the same model"
        raise RecipeError(f"the two models are not of one source: {'; '.join(unlike)}", where=where, fix=fix)
