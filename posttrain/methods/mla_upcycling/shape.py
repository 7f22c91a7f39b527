"""Dimensions and row choices of a conversion: integers only, so that a plan needs neither weights nor torch.

Legend: d_h head_dim, d_r rotary key width, d_n position-free key width, d_v value width, G KV heads, r latent rank.
A head's rotary pair l is its rows l and l + d_h/2 (half-split layout) and turns with the source's frequency l.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig

FAMILIES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class MlaShape:
    """What the conversion will look like, the same in every layer.

    Attributes:
        rope_rows: rows of a source head that become rotary, d_r of them, half-split: row i pairs with row i + d_r/2.
            Empty for rorope, where every row takes part.
        nope_rows: rows of a source head that stay position-free, d_n of them.
        rope_frequency_indices: the source frequency of every rotary pair, d_r/2 indices into the source's d_h/2.
        kv_lora_rank: r of every layer. Where ranks differ between layers they follow from the spectra, and this is the
            uniform rank of the same budget (bytes_per_token), or the largest possible (energy).
        ratio: (r + d_r) / (2·G·d_h), after rounding.
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
    if architecture.get("qk_norm"):
        raise RecipeError(
            f"{family} normalises queries and keys per head (QK-norm): a latent cannot be absorbed through that norm, "
            "and ignoring it destroys the model",
            where="inputs.model",
            fix=f"use a model of a supported family: {', '.join(FAMILIES)}",
        )
    if family not in FAMILIES:
        raise RecipeError(
            f"mla_upcycle cannot convert model_type {family}",
            where="inputs.model",
            fix=f"use a model of a supported family: {', '.join(FAMILIES)}",
        )


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
        RecipeError: unsupported family, odd or too wide rotary key, or a rank that is not possible.
    """
    check_family(architecture)
    head_dim, kv_heads = architecture["head_dim"], architecture["num_key_value_heads"]
    rope_dim = _rope_dim(head_dim, cfg)
    indices = frequency_indices(head_dim, rope_dim, "uniform" if cfg.rotary_plan == "rorope" else cfg.pairs)
    if cfg.rotary_plan == "xeco":
        # The published module rotates neighbouring rows of the last d_r with each other; half-split order keeps that.
        last = range(head_dim - rope_dim, head_dim)
        rope_rows = (*last[0::2], *last[1::2])
    elif cfg.rotary_plan == "rorope":
        rope_rows = ()
    else:
        rope_rows = (*indices, *(index + head_dim // 2 for index in indices))
    rotary = set(rope_rows)
    nope_rows = tuple(row for row in range(head_dim) if cfg.residual_kept or row not in rotary)
    return MlaShape(
        heads=architecture["num_attention_heads"],
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_size=architecture["hidden_size"],
        layers=architecture["num_hidden_layers"],
        kv_lora_rank=_rank(cfg, head_dim, kv_heads, rope_dim, architecture["num_hidden_layers"]),
        qk_nope_head_dim=len(nope_rows),
        qk_rope_head_dim=rope_dim,
        v_head_dim=head_dim,
        rope_rows=rope_rows,
        nope_rows=nope_rows,
        rope_frequency_indices=indices,
        latent_bias=bool(architecture.get("attention_bias")),
    )


def largest_rank(cfg: MlaUpcycleConfig, head_dim: int, kv_heads: int, rope_dim: int) -> int:
    """Width of what the latent has to hold: position-free keys and values, un-repeated."""
    if cfg.rotary_plan == "xeco":
        return 2 * kv_heads * head_dim
    return 2 * kv_heads * head_dim - (rope_dim if cfg.residual_kept else kv_heads * rope_dim)


def _rope_dim(head_dim: int, cfg: MlaUpcycleConfig) -> int:
    rope_dim = cfg.qk_rope_head_dim if cfg.qk_rope_head_dim is not None else 2 * (head_dim // 4)
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
    if cfg.freqfold is not None and (cfg.freqfold % collapse or head_dim // 2 % cfg.freqfold):
        raise RecipeError(
            f"freqfold {cfg.freqfold} must be a multiple of head_dim/d_r = {collapse} and divide head_dim/2 = "
            f"{head_dim // 2}",
            where="freqfold",
            fix=f"e.g. freqfold={collapse}, or null",
        )
    return rope_dim


def _rank(cfg: MlaUpcycleConfig, head_dim: int, kv_heads: int, rope_dim: int, layers: int) -> int:
    source, largest = 2 * kv_heads * head_dim, largest_rank(cfg, head_dim, kv_heads, rope_dim)
    if cfg.energy is not None:
        return largest
    if cfg.bytes_per_token is not None:
        rank, where = (
            (cfg.bytes_per_token // 2 // layers - rope_dim) // cfg.rank_multiple * cfg.rank_multiple,
            "bytes_per_token",
        )
        if rank <= 0:
            raise RecipeError(
                f"bytes_per_token {cfg.bytes_per_token} leaves no room for a latent in {layers} layers",
                where=where,
                fix=f"bytes_per_token={2 * layers * (rope_dim + cfg.rank_multiple)} or more",
            )
        rank = min(rank, largest)
    elif cfg.kv_lora_rank is not None:
        rank, where = cfg.kv_lora_rank, "kv_lora_rank"
    else:
        where = "kv_ratio"
        # (64/384) · 384 must not lose a multiple to the last digit of a float.
        wanted = int(cfg.kv_ratio * source - rope_dim + 1e-6)
        rank = wanted // cfg.rank_multiple * cfg.rank_multiple
        if rank <= 0:
            smallest = (cfg.rank_multiple + rope_dim) / source
            raise RecipeError(
                f"kv_ratio {cfg.kv_ratio} leaves no room for a latent: the source caches {source} elements, the "
                f"rotary key takes {rope_dim}, and the rank is a multiple of {cfg.rank_multiple}",
                where=where,
                fix=f"kv_ratio={smallest:.4f} or more, or a smaller qk_rope_head_dim",
            )
    if rank > largest:
        raise RecipeError(
            f"rank {rank} is larger than possible: keys and values without the rotary key have {largest} dimensions",
            where=where,
            fix=f"use at most kv_ratio=null kv_lora_rank={largest}",
        )
    return rank
