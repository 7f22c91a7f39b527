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
from posttrain.models.architecture import cache_bytes_per_token, per_layer
from posttrain.pipeline.files import list_files, read_json, write_json, write_text

FORMAT = 2
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
        "cache_bytes_per_token": {
            "predicted": _predicted_bytes(account.arch, cfg, size),
            "measured": account.facts["cache_elements_per_token"] * size,
        },
    }
    found |= _errors(account, conversion) | _perplexity(account.measured, evaluation)
    return found | {"servers": _servers(cfg, account.arch), "caveats": CAVEATS if account.norm_scale_bits else {}}


def write_certificate(folder: Path, content: dict[str, Any]) -> None:
    """`certificate.json` in a folder."""
    write_json(folder / "certificate.json", content)


def write_readme(source: Path, target: Path, content: dict[str, Any]) -> None:
    """`README.md` in an export: the model card of `source`, as far as its manifests tell, and what exporting did."""
    from posttrain.models.inspect import stated_licence
    from posttrain.report.cards import exported

    write_text(target / "README.md", exported(source, content, stated_licence(source)))


def _predicted_bytes(arch: Mapping[str, Any], cfg: ExportConfig, size: int) -> int:
    ranks, predicted = arch.get("kv_lora_rank"), cache_bytes_per_token(arch, size)
    if cfg.to == "deepseek_v3" and isinstance(ranks, list):
        predicted += size * sum(max(ranks) - rank for rank in ranks)
    return predicted


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
        layers.append({"layer": layer, "kv_lora_rank": rank, "predicted": predicted, "measured": measured})
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
