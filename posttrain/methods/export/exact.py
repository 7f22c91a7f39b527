"""Whether a stock DeepSeek-V3 can be equal to an upcycled model: decided from its architecture, without torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from posttrain.errors import Problem
from posttrain.methods.export import exact_falcon
from posttrain.methods.export.config import ExportConfig
from posttrain.models.architecture import mixers

TRANSFORMERS_EPS = 1e-6
"""What transformers' DeepSeek-V3 gives its latent norms, whatever `rms_norm_eps` is."""
_NATIVE = "use to=native"
_WHERE = "to=deepseek_v3"
_BIASES = ("attention_bias", "attention_out_bias", "latent_bias", "latent_out_bias", "mlp_bias")


def latent_eps(rms_norm_eps: float, loader: str) -> float:
    """The epsilon of the latent norms in that loader."""
    return TRANSFORMERS_EPS if loader == "transformers" else rms_norm_eps


def largest(rank: int | list[int] | None) -> int | None:
    """The rank that all layers have once they are padded; None where queries have none."""
    return max(rank) if isinstance(rank, list) and None not in rank else rank[0] if isinstance(rank, list) else rank


def kept_frequencies(arch: Mapping[str, Any]) -> list[int]:
    """Indices of the source's frequencies that the rotary key turns with."""
    if arch.get("rope_frequency_indices") is not None:
        return list(arch["rope_frequency_indices"])
    kept, pairs = arch["qk_rope_head_dim"] // 2, arch["head_dim"] // 2
    return [index * pairs // kept for index in range(kept)]


def stock_rope(arch: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` with which a stock embedding of width d_r turns by the kept frequencies; None: there are none.

    Every c-th frequency of a width c·d_r is the whole set of width d_r at the same theta (default, linear, llama3);
    the first d_r/2 are those of theta^(d_r/d_h), which only the default type can use: llama3 would scale it anew.
    Rotary settings of the latent layers' own are those of a head of width d_r already.
    """
    rope, width, head_dim = dict(arch["rope_parameters"]), arch["qk_rope_head_dim"], arch["head_dim"]
    if (own := arch.get("latent_rope_parameters")) is not None:
        return dict(own)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        return None
    kept = kept_frequencies(arch)
    if head_dim % width == 0 and kept == [index * (head_dim // width) for index in range(width // 2)]:
        return rope
    if rope["rope_type"] == "default" and kept == list(range(width // 2)):
        return {**rope, "rope_theta": rope["rope_theta"] ** (width / head_dim)}
    return None


def obstacles(
    arch: Mapping[str, Any], cfg: ExportConfig, dtype: str | None = None, left: Collection[str] = ()
) -> list[Problem]:
    """Why a `deepseek_v3` export would not be exact, each with a remedy; empty where it is.

    `dtype` is what the input is stored in, where that is known; `left` names fields that a stage yet to run decides
    layer by layer, for which `arch` has one guess.
    """
    if arch["model_type"] != "upcycled" or set(arch.get("mixers") or ()) != {"latent_attention"}:
        what = "not every layer has latent attention: DeepSeek-V3 has nothing else"
        return [Problem(what, _WHERE, _remedy(arch))]
    found = []
    if biased := [name for name in _BIASES if arch.get(name)]:
        found.append(Problem(f"DeepSeek-V3 has no place for {', '.join(biased)}", _WHERE, _NATIVE))
    if arch.get("qk_norm"):
        found.append(Problem("DeepSeek-V3 has no QK-norm on its heads", _WHERE, _NATIVE))
    for name in ("kv_lora_rank", "q_lora_rank"):
        found += _rank_problems(arch, name, cfg.pad_ranks, name in left)
    found += _rope_problems(arch, cfg.loader)
    return found + _norm_problems(arch, cfg, dtype)


def _remedy(arch: Mapping[str, Any]) -> str:
    """What a model without latent attention everywhere can do."""
    if not exact_falcon.obstacles(arch):
        return f"use to=falcon_h1, which holds states and full attention, or {_NATIVE}"
    return _NATIVE if "mamba2" in mixers(arch) else f"convert all layers, or {_NATIVE}"


def _rope_problems(arch: Mapping[str, Any], loader: str) -> list[Problem]:
    rope = stock_rope(arch)
    if rope is None:
        what = (
            f"no stock rotary embedding of width {arch['qk_rope_head_dim']} turns by the kept frequencies "
            f"{kept_frequencies(arch)} of rope_type {arch['rope_parameters']['rope_type']}"
        )
        fix = f"convert with rotary_pairs=uniform and a qk_rope_head_dim that divides head_dim, or {_NATIVE}"
        return [Problem(what, _WHERE, fix)]
    if loader == "vllm" and rope["rope_type"] != "default":
        what = f"vLLM and SGLang turn a deepseek_v3 of rope_type {rope['rope_type']} by their own YaRN instead"
        return [Problem(what, f"{_WHERE} loader=vllm", f"use loader=transformers, or {_NATIVE}")]
    return []


def _norm_problems(arch: Mapping[str, Any], cfg: ExportConfig, dtype: str | None) -> list[Problem]:
    if not arch.get("qk_latent_layernorm"):
        if cfg.dtype is None and str(dtype).endswith("float16") and not str(dtype).endswith("bfloat16"):
            what = "float16 weights cannot hold the tiny rows of an epsilon-linearised norm: they underflow"
            return [Problem(what, _WHERE, f"use dtype=bfloat16 or dtype=float32, or {_NATIVE}")]
        return []
    if latent_eps(arch["rms_norm_eps"], cfg.loader) == arch["rms_norm_eps"]:
        return []
    what = f"transformers gives trained latent norms eps {TRANSFORMERS_EPS:g}, this model has {arch['rms_norm_eps']:g}"
    return [Problem(what, f"{_WHERE} loader=transformers", f"use loader=vllm, or {_NATIVE}")]


def _rank_problems(arch: Mapping[str, Any], name: str, pad: bool, left: bool) -> list[Problem]:
    ranks = arch.get(name)
    if not isinstance(ranks, list | tuple):
        if not left or (pad and not arch.get("qk_latent_layernorm")):
            return []
        what = f"the conversion gives every layer a {name} of its own: DeepSeek-V3 has one"
        fix = "convert with rank_allocation=uniform" if pad else "use pad_ranks=true (exact)"
        return [Problem(what, _WHERE, f"{fix}, or {_NATIVE}")]
    if len(set(ranks)) == 1:
        return []
    if None in ranks or (pad and arch.get("qk_latent_layernorm")):
        return [Problem(f"{name} cannot be made uniform: {list(ranks)}", _WHERE, _NATIVE)]
    if pad:
        return []
    more = 2 * sum(max(ranks) - rank for rank in ranks)
    cost = f", {more} more cache bytes per token in bf16" if name == "kv_lora_rank" else ""
    return [
        Problem(
            f"{name} differs from layer to layer {list(ranks)}: DeepSeek-V3 has one",
            _WHERE,
            f"use pad_ranks=true (exact{cost}), or {_NATIVE}",
        )
    ]
