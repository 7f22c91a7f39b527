"""Write an export and its certificate, or fail and leave nothing."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.errors import StageError
from posttrain.methods.export import verify
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.deepseek import to_deepseek
from posttrain.methods.export.exact import latent_eps
from posttrain.models.architecture import cache_bytes_per_token, normalise
from posttrain.models.inspect import model_meta
from posttrain.models.loading import load_model, load_tokenizer, save_model
from posttrain.pipeline.files import clear, list_files, read_json, write_json

TOLERANCE = 1e-5
NATIVE_ONLY = "vLLM, SGLang, TGI and llama.cpp cannot load it (custom architecture): serve with transformers or chat"
CAVEATS = {
    "a": "epsilon differs by loader (transformers: 1e-6; vLLM, SGLang: rms_norm_eps): use it with `loader` only",
    "b": "do not train it in this state: the scaled rows are tiny and the norms do nothing",
    "c": "the loader must compute the mean square in fp32, and float16 weights underflow",
    "d": "weight-only fp8 needs a scale per row",
}


def export_model(
    source: Path,
    target: Path,
    cfg: ExportConfig,
    *,
    conversion: Path | None = None,
    evaluation: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the export to `target`; the certificate as JSON.

    Raises:
        RecipeError: an exact export does not exist.
        StageError: the measured fp32 logits differ by more than 1e-5, relative; `target` is left empty.
    """
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    try:
        model, tokenizer = load_model(source), load_tokenizer(source)
        exported = to_deepseek(model, cfg) if cfg.to == "deepseek_v3" else model
        save_model(exported, tokenizer, scratch / "fp32", tokenizer_from=source)
        steps, facts = _measure(model, scratch, cfg, seed)
        stored = getattr(torch, cfg.dtype or str(model_meta(source).extra.get("dtype") or "float32"))
        save_model(exported, tokenizer, target, dtype=stored, tokenizer_from=source)
        if stored != torch.float32:
            steps.append(_stored(model, target, scratch, cfg, seed, stored))
        return _certificate(source, target, cfg, model, steps, facts, conversion, evaluation, stored)
    except BaseException:
        clear(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _eps(model: Any, cfg: ExportConfig) -> float:
    """What the probe must give the latent norms; 0 leaves them as transformers builds them."""
    stock = cfg.to == "deepseek_v3" and cfg.loader != "transformers"
    return latent_eps(model.config.rms_norm_eps, cfg.loader) if stock else 0.0


@torch.no_grad()
def _measure(model: Any, scratch: Path, cfg: ExportConfig, seed: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    ids = verify.prompt_ids(model.config.vocab_size, seed)
    wanted = model(ids, use_cache=False).logits
    steps = []
    if cfg.to == "deepseek_v3":
        plain = to_deepseek(model, cfg, linearise=False)
        if not model.config.qk_latent_layernorm:
            for layer in plain.model.layers:
                layer.self_attn.kv_a_layernorm = nn.Identity()
                layer.self_attn.q_a_layernorm = nn.Identity()
        layout = verify.errors(wanted, plain(ids, use_cache=False).logits)
        steps.append(_step("layout: interleaved rotary rows, softmax scale, padded ranks", layout))
    logits, decoded, facts = verify.probe(scratch / "fp32", ids, scratch / "probe", _eps(model, cfg))
    steps.append(_step("whole export in fp32, new process", verify.errors(wanted, logits)))
    steps.append(_step("decoding with the cache, new process", verify.errors(wanted[:, -1:], decoded)))
    for step in steps:
        if not step["relative"] <= TOLERANCE:
            raise StageError(
                f"{step['name']}: logits are off by {step['relative']:.1e} (relative), more than {TOLERANCE:g}",
                where=f"to={cfg.to} loader={cfg.loader}",
                fix="large latents need norm_scale_bits=30; or use to=native",
            )
    return steps, facts


def _step(name: str, error: dict[str, float]) -> dict[str, Any]:
    return {"name": name, "exact": True, **error}


@torch.no_grad()
def _stored(
    model: Any, target: Path, scratch: Path, cfg: ExportConfig, seed: int, dtype: torch.dtype
) -> dict[str, Any]:
    ids = verify.prompt_ids(model.config.vocab_size, seed)
    logits, _, _ = verify.probe(target, ids, scratch / "probe", _eps(model, cfg))
    error = verify.errors(model(ids, use_cache=False).logits, logits)
    note = f"rounding of the weights to {dtype}; about 1e-2 is the noise floor of bf16; not a condition of the export"
    return {"name": "stored weights", "exact": False, **error, "note": note}


def _certificate(
    source: Path,
    target: Path,
    cfg: ExportConfig,
    model: Any,
    steps: list[dict[str, Any]],
    facts: dict[str, Any],
    conversion: Path | None,
    evaluation: Path | None,
    stored: torch.dtype,
) -> dict[str, Any]:
    upcycled = model.config.model_type == "upcycled"
    arch = normalise(model.config.to_dict())
    size = torch.empty((), dtype=stored).element_size()
    ranks = arch.get("kv_lora_rank")
    predicted = cache_bytes_per_token(arch, size)
    if cfg.to == "deepseek_v3" and isinstance(ranks, list):
        predicted += size * sum(max(ranks) - rank for rank in ranks)
    metrics = read_json(evaluation / "metrics.json") if evaluation else {}
    linearised = cfg.to == "deepseek_v3" and not model.config.qk_latent_layernorm
    return {
        "format": 1,
        "to": cfg.to,
        "loader": cfg.loader if cfg.to == "deepseek_v3" else "transformers",
        "latent_norm_eps": latent_eps(model.config.rms_norm_eps, cfg.loader) if cfg.to == "deepseek_v3" else None,
        "class": facts["class"],
        "dtype": str(stored).removeprefix("torch."),
        "digests": {"source": _digests(source), "export": _digests(target)},
        "tolerance": TOLERANCE,
        "steps": steps,
        "cache_bytes_per_token": {"predicted": predicted, "measured": facts["cache_elements_per_token"] * size},
        "conversion": {"layers": read_json(conversion / "conversion.json")["layers"]} if conversion else None,
        "perplexity": metrics.get("perplexity"),
        "perplexity_of": "the model before export" if evaluation else "null: no `evaluation` input was given",
        "servers": NATIVE_ONLY if upcycled and cfg.to == "native" else "any that knows the class",
        "caveats": CAVEATS if linearised else {},
    }


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name, path in list_files(folder).items():
        if path.suffix in (".safetensors", ".json"):
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def write_certificate(folder: Path, certificate: dict[str, Any]) -> None:
    """`certificate.json` in a folder."""
    write_json(folder / "certificate.json", certificate)
