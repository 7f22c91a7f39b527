"""What is known of an export, as JSON: exactness by step, errors by layer, bytes, perplexity, caveats."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.exact import latent_eps
from posttrain.methods.export.targets import Holdings, holdings
from posttrain.models.architecture import STATE_SIZE, per_layer
from posttrain.pipeline.files import list_files, read_json, write_json, write_text

FORMAT = 3
NATIVE_ONLY = "vLLM, SGLang, TGI and llama.cpp cannot load it (custom architecture): serve with transformers or chat"
SERVERS = {
    "transformers": "transformers only: vLLM and SGLang give the latent norms another epsilon (loader=vllm is theirs)",
    "vllm": "vLLM and SGLang by their conventions, which were simulated here, not run; transformers would be wrong",
}
CAVEATS = {
    "a": "epsilon differs by loader (transformers: 1e-6; vLLM, SGLang: rms_norm_eps): use it with `loader` only",
    "b": "do not train it in this state: the scaled rows are tiny and the norms do nothing",
    "c": "the loader must compute the mean square in fp32, and float16 weights underflow",
    "d": "weight-only fp8 needs a scale per row",
}
FALCON_SERVERS = (
    "transformers: 5.23 was tried; 5.17 and 5.18 have the class, but decode batches wrongly behind its gated norm (one "
    "sequence is right). vLLM's documentation lists FalconH1ForCausalLM; no server was tried"
)
FALCON_CAVEATS = {
    "a": "every layer caches keys and holds a state, used or not: what the hybrid saves of the cache is lost",
    "b": "transformers rounds A_log, D and dt_bias when it loads the class in bf16; the files hold them in fp32",
    "c": "packed documents in one row and padding inside a text are not told apart by its states",
}
PREDICTED = ("key_error", "value_error", "rel_error")
EVALUATED = ("documents", "tokens", "perplexity", "baseline_perplexity", "kl", "top1_agreement", "nll_gap")


@dataclass(frozen=True)
class Account:
    """What `write` found; `layers` and `measured` are None without a source and without text."""

    arch: Mapping[str, Any]
    dtype: torch.dtype
    steps: list[dict[str, Any]]
    tolerance: float
    noise: float
    generation: dict[str, Any]
    facts: dict[str, Any]
    parameters: int
    norm_scale_bits: int | None
    layers: list[float] | None
    measured: dict[str, Any] | None


def certificate(
    source: Path,
    target: Path,
    cfg: ExportConfig,
    account: Account,
    conversion: Path | None = None,
    evaluation: Path | None = None,
) -> dict[str, Any]:
    """The certificate of a written export."""
    stock = cfg.to == "deepseek_v3"
    size = torch.empty((), dtype=account.dtype).element_size()
    found = {
        "format": FORMAT,
        "to": cfg.to,
        "loader": cfg.loader if stock else "transformers",
        "class": account.facts["class"],
        "dtype": str(account.dtype).removeprefix("torch."),
        "latent_norm_eps": latent_eps(account.arch["rms_norm_eps"], cfg.loader) if stock else None,
        "norm_scale_bits": account.norm_scale_bits,
        "digests": {"source": _digests(source), "export": _digests(target)},
        "tolerance": account.tolerance,
        "rounding_noise": account.noise,
        "steps": account.steps,
        "generation": account.generation,
        "tokenizer": {"equal": True, "eos_token_id": account.facts["eos"]},
        **_held(account, cfg, size),
    }
    found |= _errors(account, conversion) | _perplexity(account.measured, evaluation)
    caveats = FALCON_CAVEATS if cfg.to == "falcon_h1" else CAVEATS if account.norm_scale_bits else {}
    return found | {"servers": _servers(cfg, account.arch), "caveats": caveats}


def write_certificate(folder: Path, content: dict[str, Any]) -> None:
    """`certificate.json` in a folder."""
    write_json(folder / "certificate.json", content)


def write_readme(source: Path, target: Path, content: dict[str, Any]) -> None:
    """`README.md` in an export: the model card of `source`, as far as its manifests tell, and what exporting did."""
    from posttrain.models.inspect import stated_licence
    from posttrain.report.cards import exported

    write_text(target / "README.md", exported(source, content, stated_licence(source)))


def _held(account: Account, cfg: ExportConfig, size: int) -> dict[str, Any]:
    """Parameters and cache of the export, predicted and measured, and those of the model."""
    facts, export = account.facts, holdings(account.arch, cfg, size)
    model: Holdings = holdings(account.arch, ExportConfig(), size)
    states = facts["state_elements"] * STATE_SIZE + facts["column_elements"] * size
    return {
        "parameters": {"predicted": export.parameters, "measured": facts["parameters"], "model": account.parameters},
        "cache_bytes_per_token": {
            "predicted": export.cache_bytes_per_token,
            "measured": facts["cache_elements_per_token"] * size,
            "model": model.cache_bytes_per_token,
        },
        "cache_state_bytes": {
            "predicted": export.cache_state_bytes,
            "measured": states,
            "model": model.cache_state_bytes,
        },
    }


def _errors(account: Account, conversion: Path | None) -> dict[str, Any]:
    """By layer: what the conversion predicted and what was measured against the source."""
    if account.arch["model_type"] != "upcycled":
        return {"layers": None, "errors_are": "null: a plain model is written as it is"}
    report = read_json(conversion / "conversion.json")["layers"] if conversion else None
    layers = []
    for layer in range(account.arch["num_hidden_layers"]):
        predicted = {name: report[layer][name] for name in PREDICTED} if report else None
        measured = {"output_error": account.layers[layer]} if account.layers else None
        rank = per_layer(account.arch["kv_lora_rank"], layer)
        mixer = account.arch["mixers"][layer]
        layers.append(
            {"layer": layer, "mixer": mixer, "kv_lora_rank": rank, "predicted": predicted, "measured": measured}
        )
    said = "relative, against the source. predicted: at conversion, before any training, on its calibration text; null "
    said += "without input `conversion`. measured: of this model, each layer fed with the source's activations; null "
    return {"layers": layers, "errors_are": said + "without input `source`"}


def _perplexity(measured: dict[str, Any] | None, evaluation: Path | None) -> dict[str, Any]:
    metrics = read_json(evaluation / "metrics.json") if evaluation else {}
    evaluated = {name: metrics[name] for name in EVALUATED if name in metrics} or None
    perplexity = measured["perplexity"]["export"] if measured else metrics.get("perplexity")
    whose = "null: neither `data` nor `evaluation` was given"
    if perplexity is not None:
        whose = "the export as stored, fp32 arithmetic" if measured else "the model before export"
    return {"perplexity": perplexity, "perplexity_of": whose, "measured": measured, "evaluation": evaluated}


def _servers(cfg: ExportConfig, arch: Mapping[str, Any]) -> str:
    if cfg.to == "native":
        return NATIVE_ONLY if arch["model_type"] == "upcycled" else "any that knows the class"
    if cfg.to == "falcon_h1":
        return FALCON_SERVERS
    rope_type = arch["rope_parameters"]["rope_type"]
    if rope_type != "default":
        return (
            f"transformers only: vLLM and SGLang turn a deepseek_v3 of rope_type {rope_type} by their own YaRN instead"
        )
    if arch["qk_latent_layernorm"] or latent_eps(arch["rms_norm_eps"], "vllm") == latent_eps(0.0, "transformers"):
        return SERVERS["vllm"].split(";")[0] + "; transformers too: both use the same epsilon here"
    return SERVERS[cfg.loader]


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name, path in list_files(folder).items():
        if path.suffix in (".safetensors", ".json", ".jinja", ".py"):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
