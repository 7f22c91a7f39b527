"""From a budget to the rank of a layer: integers only."""

from __future__ import annotations

from posttrain.errors import RecipeError
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.presets import BUDGETS


def largest_rank(cfg: MlaUpcycleConfig, head_dim: int, kv_heads: int, rope_dim: int) -> int:
    """Width of what the latent has to hold: position-free keys and values, un-repeated."""
    if cfg.rotary_plan == "xeco":
        return 2 * kv_heads * head_dim
    if cfg.rotary_plan == "lossless":
        return kv_heads * head_dim
    return 2 * kv_heads * head_dim - (rope_dim if cfg.residual_kept else kv_heads * rope_dim)


def rank_of_budget(cfg: MlaUpcycleConfig, head_dim: int, kv_heads: int, rope_dim: int, layers: int) -> int:
    """r of every layer under the config's budget; where ranks follow from spectra, the largest possible.

    Raises:
        RecipeError: the budget leaves no room for a latent, or asks for more than there is.
    """
    source, largest = 2 * kv_heads * head_dim, largest_rank(cfg, head_dim, kv_heads, rope_dim)
    if cfg.energy is not None or not any(getattr(cfg, name) for name in BUDGETS):
        return _end_rank_fits(cfg, largest)
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


def _end_rank_fits(cfg: MlaUpcycleConfig, largest: int) -> int:
    """`largest`, where ranks follow from spectra or no budget is given (lossless)."""
    if cfg.end_layer_rank is not None and cfg.end_layer_rank > largest:
        raise RecipeError(
            f"end_layer_rank {cfg.end_layer_rank} is larger than possible, {largest}",
            where="end_layer_rank",
            fix=f"end_layer_rank={largest} or less",
        )
    return largest
