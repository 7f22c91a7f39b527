"""Write an export and its certificate, or fail and leave nothing."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import RecipeError, StageError
from posttrain.methods.export import verify
from posttrain.methods.export.certificate import Account, certificate
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.deepseek import scale_bits, to_deepseek
from posttrain.methods.export.exact import latent_eps
from posttrain.methods.export.falcon import check_installed, to_falcon
from posttrain.methods.export.measure import layer_errors, on_text
from posttrain.methods.export.targets import obstacles
from posttrain.models.architecture import normalise
from posttrain.models.inspect import model_meta
from posttrain.models.loading import load_model, load_tokenizer, save_model
from posttrain.pipeline.files import clear

TOLERANCE = 1e-5
"""Of logits in fp32, relative; twice the model's own rounding noise where that is more."""


@dataclass(frozen=True)
class Given:
    """Optional inputs, folders all: account of the conversion, evaluation, source model and text."""

    conversion: Path | None = None
    evaluation: Path | None = None
    source: Path | None = None
    data: Path | None = None


def export_model(
    source: Path, target: Path, cfg: ExportConfig, given: Given | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Write the export of `source` to `target`, an empty folder; the certificate as JSON.

    Raises:
        RecipeError: an exact export does not exist.
        StageError: logits, greedy tokens or tokenizer measured in a new process are others; `target` is left empty.
    """
    given = given or Given()
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=target.parent))
    try:
        meta = model_meta(source)
        dtype = cfg.dtype or str(meta.extra.get("dtype") or "float32").removeprefix("torch.")
        if problems := obstacles(meta.architecture, cfg, dtype):
            raise RecipeError(problems=problems)
        account = _write(source, target, cfg, given, scratch, seed, getattr(torch, dtype))
        return certificate(source, target, cfg, account, given.conversion, given.evaluation)
    except BaseException:
        clear(target)
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(
    source: Path, target: Path, cfg: ExportConfig, given: Given, scratch: Path, seed: int, dtype: torch.dtype
) -> Account:
    model, tokenizer = load_model(source), load_tokenizer(source)
    exported = _exported(model, cfg)
    save_model(exported, tokenizer, scratch / "fp32", tokenizer_from=source)
    check = _Check(model, cfg, verify.prompt_ids(model.config.vocab_size, seed), scratch / "probe")
    check.layout(exported)
    check.whole(scratch / "fp32", tokenizer)
    shutil.rmtree(scratch / "fp32")
    save_model(exported, tokenizer, target, dtype=dtype, tokenizer_from=source)
    if dtype != torch.float32:
        check.stored(target, dtype)
    del exported
    linearised = cfg.to == "deepseek_v3" and not model.config.qk_latent_layernorm
    measured, layers = _measured(model, target, cfg, given, check.eps)
    return Account(
        arch=normalise(model.config.to_dict()),
        dtype=dtype,
        steps=check.steps,
        tolerance=check.tolerance,
        noise=check.noise,
        generation=check.generation,
        facts=check.facts,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        norm_scale_bits=scale_bits(model, cfg) if linearised else None,
        layers=layers,
        measured=measured,
    )


def _exported(model: Any, cfg: ExportConfig) -> Any:
    if cfg.to == "native":
        return model
    if cfg.to == "deepseek_v3":
        return to_deepseek(model, cfg)
    check_installed(model.config)
    return to_falcon(model)


def _measured(
    model: Any, target: Path, cfg: ExportConfig, given: Given, eps: float
) -> tuple[dict[str, Any] | None, list[float] | None]:
    """Perplexities and divergences on the text, and errors by layer against the source; None where not given."""
    origin = load_model(given.source) if given.source else None
    if origin is not None and origin.config.vocab_size != model.config.vocab_size:
        raise RecipeError("the source has another vocabulary than the model", "inputs.source", "give its own source")
    layers = None
    if origin is not None and model.config.model_type == "upcycled":
        layers = layer_errors(origin, model, given.data, target, cfg)
    if given.data is None:
        return None, layers
    written = verify.load_here(target, eps)
    return on_text({"export": written, "native": model, "source": origin}, given.data, target, cfg), layers


class _Check:
    """Everything that must be equal between a model and its export, step by step."""

    def __init__(self, model: Any, cfg: ExportConfig, ids: Tensor, work: Path) -> None:
        self.model, self.cfg, self.ids, self.work = model, cfg, ids, work
        self.steps: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self.generation: dict[str, Any] = {}
        with torch.no_grad():
            self.wanted = model(ids, use_cache=False).logits
        self.noise = verify.noise(model, ids, self.wanted)
        self.tolerance = max(TOLERANCE, 2 * self.noise)

    @property
    def eps(self) -> float:
        """What the probe must give the latent norms; 0 leaves them as transformers builds them."""
        stock = self.cfg.to == "deepseek_v3" and self.cfg.loader != "transformers"
        return latent_eps(self.model.config.rms_norm_eps, self.cfg.loader) if stock else 0.0

    @torch.no_grad()
    def layout(self, exported: Any) -> None:
        """The rearranged tensors alone, in this process."""
        if self.cfg.to == "native":
            return
        what, model = "shared rows of the states written out, unused halves zero", exported
        if self.cfg.to == "deepseek_v3":
            what, model = "interleaved rotary rows, softmax scale, padded ranks", self._without_norms()
        self._exact(f"layout: {what}", self.wanted, model(self.ids, use_cache=False).logits)

    def whole(self, folder: Path, tokenizer: Any) -> None:
        """The fp32 folder in a new process."""
        found = self._probe(folder)
        self.facts = found.facts
        self._exact("whole export in fp32, new process", self.wanted, found.logits)
        self._exact("decoding with the cache, new process", self.wanted[:, -1:], found.decoded)
        padded = verify.of_padded(self.model, self.ids)
        self._exact("left-padded batch, then decoding, new process", padded, found.padded)
        self._same_tokenizer(tokenizer)
        self.generation = verify.compare_generated(self.model, self.ids, found.generated, self.tolerance)
        if not (self.generation["equal"] or self.generation["tie"]):
            self._refuse("greedy tokens with the cache differ in a new process")

    @torch.no_grad()
    def stored(self, folder: Path, dtype: torch.dtype) -> None:
        """What rounding the weights does; no condition."""
        note = f"rounding of the weights to {dtype}; about 1e-2 is the floor of bf16; not a condition of the export"
        self._rounded("stored weights", self._probe(folder).logits, note)
        if self.cfg.to == "falcon_h1":
            loaded = verify.load_here(folder, self.eps, dtype).float()
            note = f"stored weights with A_log, D and dt_bias rounded too, as transformers does loading in {dtype}"
            self._rounded("decays as loaded", loaded(self.ids, use_cache=False).logits, note)

    def _rounded(self, name: str, found: Tensor, note: str) -> None:
        self.steps.append({"name": name, "exact": False, **verify.errors(self.wanted, found), "note": note})

    def _probe(self, folder: Path) -> verify.Found:
        return verify.probe(folder, self.ids, self.work, eps=self.eps, custom_code=self.cfg.to == "native")

    def _without_norms(self) -> nn.Module:
        plain = to_deepseek(self.model, self.cfg, linearise=False)
        if not self.model.config.qk_latent_layernorm:
            for layer in plain.model.layers:
                layer.self_attn.kv_a_layernorm = layer.self_attn.q_a_layernorm = nn.Identity()
        return plain

    def _exact(self, name: str, wanted: Tensor, found: Tensor) -> None:
        error = verify.errors(wanted, found)
        self.steps.append({"name": name, "exact": True, **error})
        if not error["relative"] <= self.tolerance:
            self._refuse(f"{name}: logits are off by {error['relative']:.1e} relative, {self.tolerance:.0e} allowed")

    def _same_tokenizer(self, tokenizer: Any) -> None:
        wanted = [tokenizer(text)["input_ids"] for text in verify.TEXTS]
        if self.facts["tokens"] != wanted or self.facts["chat_template"] != tokenizer.chat_template:
            self._refuse("the tokenizer of the export gives other tokens, or has another chat template")
        if self.facts["eos"][0] != tokenizer.eos_token_id:
            self._refuse(f"EOS is {self.facts['eos'][0]} in the export, {tokenizer.eos_token_id} in the model")

    def _refuse(self, what: str) -> None:
        stock = self.cfg.to == "deepseek_v3"
        fix = "leave norm_scale_bits null, or use to=native" if stock else "report this as a fault"
        raise StageError(what, where=f"to={self.cfg.to} loader={self.cfg.loader}", fix=fix)
