"""Dimensions and row choices of a conversion: integers only, so that a plan needs neither weights nor torch.

Legend: d_h head_dim, d_r rotary key width, d_n position-free key width, d_v value width, G KV heads, r latent rank.
A head's rotary pair l is its rows l and l + d_h/2 (half-split layout) and turns with the source's frequency l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.budget import rank_of_budget
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.models.architecture import normalise

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class MlaShape:
    """What the conversion will look like, the same in every layer.

    Attributes:
        rope_rows: rows of a source head that become rotary, d_r of them, half-split: row i pairs with row i + d_r/2.
            Empty for rorope and lossless, where every row takes part.
        nope_rows: rows of a source head that stay position-free, d_n of them.
        rope_frequency_indices: the source frequency of every rotary pair, d_r/2 indices into the source's d_h/2;
            lossless: each G times. Without a meaning where `latent_rope_parameters` are given.
        kv_lora_rank: r of every layer. Where ranks differ between layers they follow from the spectra, and this is the
            uniform rank of the same budget (bytes_per_token), or the largest possible (energy).
        ratio: (r + d_r) / (2·G·d_h), after rounding.
        qk_norm: keys are normalised before they are compressed, queries before they are mapped (Qwen3).
        q_lora_rank: rank of the query projection, None for a full one.
        latent_rope_parameters: rotary settings of the converted layers alone (YaRN), None: the source's frequencies.
    """

    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    layers: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_rows: tuple[int, ...]
    nope_rows: tuple[int, ...]
    rope_frequency_indices: tuple[int, ...]
    latent_bias: bool
    qk_norm: bool = False
    q_lora_rank: int | None = None
    latent_rope_parameters: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MlaShape:
        """The shape in a `conversion.json`."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})

    @property
    def source_elements(self) -> int:
        """Elements the source caches per token and layer."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def cache_elements(self) -> int:
        """Elements the converted model caches per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def ratio(self) -> float:
        return self.cache_elements / self.source_elements


def check_family(architecture: Mapping[str, Any]) -> None:
    """Raise RecipeError unless this attention can be converted exactly at full rank."""
    family = architecture["model_type"]
    if family == "upcycled":
        raise RecipeError(
            "mla_upcycle wants a plain source model, this one is upcycled already",
            where="inputs.model",
            fix="start from the source: inputs.model=model",
        )
    if family not in FAMILIES:
        raise RecipeError(
            f"mla_upcycle cannot convert model_type {family}",
            where="inputs.model",
            fix=f"use a model of a supported family: {', '.join(FAMILIES)}",
        )


def misfits(shape: MlaShape, architecture: Mapping[str, Any]) -> list[str]:
    """Why a plan of that shape cannot be carried out on a model of that architecture; empty where it can."""
    wanted = {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "qk_norm": shape.qk_norm,
    }
    found = [
        f"{name} is {architecture[name]}, the plan has {value}"
        for name, value in wanted.items()
        if architecture[name] != value
    ]
    if architecture["attention_bias"] and not shape.latent_bias:
        found.append("keys and values have biases, the plan has none")
    return found


def frequency_indices(head_dim: int, rope_dim: int, choice: str) -> tuple[int, ...]:
    """d_r/2 of the d_h/2 rotary pairs, pair 0 being the fastest.

    `uniform` is {0, c, 2c, …} with c = d_h/d_r: where c is an integer, what a stock rotary embedding of width d_r has
    at the same theta. `fastest` is {0, 1, 2, …}: what it has at theta^(d_r/d_h).
    """
    kept, pairs = rope_dim // 2, head_dim // 2
    if choice == "fastest":
        return tuple(range(kept))
    return tuple(index * pairs // kept for index in range(kept))


def resolve_shape(architecture: Mapping[str, Any], cfg: MlaUpcycleConfig) -> MlaShape:
    """Dimensions of the converted model, from normalised `config.json` fields.

    Raises:
        RecipeError: unsupported architecture, odd or too wide rotary key, or a rank that is not possible.
    """
    architecture = normalise(architecture)
    check_family(architecture)
    head_dim, kv_heads = architecture["head_dim"], architecture["num_key_value_heads"]
    rope_dim = _rope_dim(head_dim, kv_heads, cfg)
    indices, rope_rows, nope_rows = _rows(head_dim, kv_heads, rope_dim, cfg)
    biased = bool(architecture.get("attention_bias"))
    # Normalised keys have a mean even without biases; a bias leaves it out of the latent.
    centred = architecture["qk_norm"] and bool(nope_rows) and cfg.rotary_plan != "xeco"
    return MlaShape(
        heads=architecture["num_attention_heads"],
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=architecture["hidden_size"],
        layers=architecture["num_hidden_layers"],
        kv_lora_rank=rank_of_budget(cfg, head_dim, kv_heads, rope_dim, architecture["num_hidden_layers"]),
        qk_nope_head_dim=len(nope_rows),
        qk_rope_head_dim=rope_dim,
        v_head_dim=head_dim,
        rope_rows=rope_rows,
        nope_rows=nope_rows,
        rope_frequency_indices=indices,
        latent_bias=biased or centred,
        qk_norm=architecture["qk_norm"],
        q_lora_rank=_query_rank(architecture, cfg),
        latent_rope_parameters=own_rope(architecture["rope_parameters"], cfg),
    )


def own_rope(rope: Mapping[str, Any], cfg: MlaUpcycleConfig) -> dict[str, Any] | None:
    """Rotary settings of latent layers under `rotary_scaling`; None: the source's frequencies.

    YaRN replaces a scaling, as in X-EcoMLA's code; a source without one keeps its plain frequencies unless
    `yarn_factor` asks for more. mscale 1 and mscale_all_dim 0 there: cos and sin times 0.1 ln(factor) + 1, which is
    what transformers does where neither is given.

    Raises:
        RecipeError: the source says nothing of its original context, or its scaling has no factor.
    """
    factor = cfg.yarn_factor or rope.get("factor")
    if cfg.rotary_scaling == "source" or (rope["rope_type"] == "default" and cfg.yarn_factor is None):
        return None
    original = cfg.yarn_original_max_position_embeddings or rope.get("original_max_position_embeddings")
    for name, value in (("yarn_factor", factor), ("yarn_original_max_position_embeddings", original)):
        if value is None:
            raise RecipeError(
                f"rotary_scaling=yarn needs {name}: the source's rotary settings do not say it",
                where=name,
                fix="e.g. yarn_factor=32 yarn_original_max_position_embeddings=8192, or rotary_scaling=source",
            )
    own = {"rope_type": "yarn", "rope_theta": rope["rope_theta"], "factor": float(factor)}
    return {**own, "original_max_position_embeddings": original, "beta_fast": 32.0, "beta_slow": 1.0}


def _rows(
    head_dim: int, kv_heads: int, rope_dim: int, cfg: MlaUpcycleConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Frequency indices, rotary rows and position-free rows."""
    if cfg.rotary_plan == "lossless":
        return tuple(pair for pair in range(head_dim // 2) for _ in range(kv_heads)), (), ()
    indices = frequency_indices(head_dim, rope_dim, cfg.pairs)
    if cfg.rotary_plan == "xeco":
        # The published module rotates neighbouring rows of the last d_r with each other; half-split order keeps that.
        last = range(head_dim - rope_dim, head_dim)
        rope_rows = (*last[0::2], *last[1::2])
    elif cfg.rotary_plan == "rorope":
        rope_rows = ()
    else:
        rope_rows = (*indices, *(index + head_dim // 2 for index in indices))
    rotary = set(rope_rows)
    return indices, rope_rows, tuple(row for row in range(head_dim) if cfg.residual_kept or row not in rotary)


def _query_rank(architecture: Mapping[str, Any], cfg: MlaUpcycleConfig) -> int | None:
    largest = min(architecture["hidden_size"], architecture["num_attention_heads"] * architecture["head_dim"])
    if cfg.q_lora_rank is not None and cfg.q_lora_rank > largest:
        raise RecipeError(
            f"q_lora_rank {cfg.q_lora_rank} is larger than possible: queries have at most {largest} dimensions",
            where="q_lora_rank",
            fix=f"q_lora_rank={largest} or less, or null for the full projection",
        )
    return cfg.q_lora_rank


def _rope_dim(head_dim: int, kv_heads: int, cfg: MlaUpcycleConfig) -> int:
    if cfg.rotary_plan == "lossless":
        if cfg.qk_rope_head_dim not in (None, kv_heads * head_dim):
            raise RecipeError(
                f"rotary_plan=lossless keeps every key rotary: qk_rope_head_dim is {kv_heads * head_dim}, not "
                f"{cfg.qk_rope_head_dim}",
                where="qk_rope_head_dim",
                fix="qk_rope_head_dim=null, or another rotary_plan",
            )
        return kv_heads * head_dim
    rope_dim = cfg.qk_rope_head_dim if cfg.qk_rope_head_dim is not None else cfg.usual_rope_dim(head_dim)
    where = "qk_rope_head_dim"
    if rope_dim % 2 or rope_dim > head_dim:
        raise RecipeError(
            f"qk_rope_head_dim {rope_dim} must be even and at most the source's head_dim {head_dim}",
            where=where,
            fix=f"e.g. qk_rope_head_dim={2 * (head_dim // 4)}",
        )
    if cfg.rotary_plan != "paired" and head_dim % rope_dim:
        raise RecipeError(
            f"rotary_plan={cfg.rotary_plan} needs a qk_rope_head_dim that divides head_dim {head_dim}, "
            f"{rope_dim} does not",
            where=where,
            fix=f"e.g. qk_rope_head_dim={head_dim // 2}",
        )
    collapse = head_dim // rope_dim
    if isinstance(cfg.freqfold, int) and (cfg.freqfold % collapse or head_dim // 2 % cfg.freqfold):
        raise RecipeError(
            f"freqfold {cfg.freqfold} must be a multiple of head_dim/d_r = {collapse} and divide head_dim/2 = "
            f"{head_dim // 2}",
            where="freqfold",
            fix=f"e.g. freqfold={collapse}, or null",
        )
    return rope_dim
