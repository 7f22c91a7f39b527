"""The layouts an export can have: why one would not be exact, and what it holds. Decided without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import Problem
from posttrain.methods.export import exact, exact_falcon
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.exact_falcon import attention_half, state_half
from posttrain.models.architecture import (
    cache_bytes_per_token,
    cache_state_bytes,
    mixer_parameters,
    parameter_count,
)


def obstacles(
    arch: Mapping[str, Any], cfg: ExportConfig, dtype: str | None = None, left: Collection[str] = ()
) -> list[Problem]:
    """Why an export in the layout `cfg.to` would not be exact, each with a remedy; empty where it is.

    `dtype` is what the input is stored in, where that is known; `left`: fields that a stage yet to run decides.
    """
    if cfg.to == "native":
        return []
    if cfg.to == "deepseek_v3":
        return exact.obstacles(arch, cfg, dtype, left)
    found = exact_falcon.obstacles(arch)
    if cfg.loader != "transformers":
        what = f"loader={cfg.loader} is a way to write deepseek_v3: a falcon_h1 is the same for every loader"
        found.append(Problem(what, "to=falcon_h1", "leave loader out"))
    return found


@dataclass(frozen=True)
class Holdings:
    """Parameters, bytes by which the cache of a sequence grows per token, and those it has whatever its length."""

    parameters: int
    cache_bytes_per_token: int
    cache_state_bytes: int


def holdings(arch: Mapping[str, Any], cfg: ExportConfig, element_size: int = 2) -> Holdings:
    """What an export in the layout `cfg.to` holds; `element_size` in bytes is that of the cache, states are fp32."""
    if cfg.to == "falcon_h1":
        attention, state = attention_half(arch), state_half(arch)
        mixed = sum(mixer_parameters(state, layer) for layer in range(arch["num_hidden_layers"]))
        growing, constant = cache_bytes_per_token(attention, element_size), cache_state_bytes(state, element_size)
        return Holdings(parameter_count(attention) + mixed, growing, constant)
    stock = arch
    if cfg.to == "deepseek_v3":
        ranks = {name: exact.largest(arch[name]) for name in ("kv_lora_rank", "q_lora_rank")}
        stock = {**arch, **ranks, "qk_latent_layernorm": True}
    growing, constant = cache_bytes_per_token(stock, element_size), cache_state_bytes(stock, element_size)
    return Holdings(parameter_count(stock), growing, constant)
