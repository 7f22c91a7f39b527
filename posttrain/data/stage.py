"""The stage behind a recipe's `data:` and `datasets.NAME:`: puts a training and a held-out text into the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.data import foreign, sources
from posttrain.data.builders import committed
from posttrain.data.config import DataSourceConfig
from posttrain.data.documents import BYTES_PER_TOKEN, write_dataset
from posttrain.data.reading import read_card
from posttrain.errors import RecipeError, StageError
from posttrain.models.sources.hub import is_commit
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.stage import ArtifactMeta, Estimate, InputSpec, Stage

WRITERS = ("teacher_samples", "preference_pairs")
"""Builders whose text the input model writes."""

WRITTEN_BY_SEED = (*WRITERS, "reasoning_gym")


class DataSource(Stage):
    """Read, build or sample text and hold documents out of it. See `DataSourceConfig`."""

    type: ClassVar[str] = "data_source"
    version: ClassVar[str] = "1"
    Config = DataSourceConfig
    inputs: ClassVar[dict[str, InputSpec]] = {
        "model": InputSpec("model", optional=True, doc="Writes what `teacher_samples` or `preference_pairs` samples.")
    }
    outputs: ClassVar[dict[str, str]] = {"train": "dataset", "heldout": "dataset"}

    def config_for(self, body: Mapping[str, Any]) -> type[DataSourceConfig]:
        return foreign.config_model(body)

    def external(self, cfg: DataSourceConfig) -> dict[str, Any]:
        return sources.external(cfg)

    def uses_seed(self, cfg: DataSourceConfig) -> bool:
        """Only where the text is sampled or generated; every other builder is the same for all seeds."""
        return foreign.builder_of(cfg).random if foreign.is_foreign(cfg) else cfg.kind in WRITTEN_BY_SEED

    def describe(self, cfg: DataSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> dict[str, ArtifactMeta]:
        metas = {}
        for name, size in zip(("train", "heldout"), sources.sizes(cfg), strict=True):
            tokens = None if size.bytes is None else size.bytes // BYTES_PER_TOKEN
            extra = {"label": _label(cfg, name), "split": name, "bytes": size.bytes}
            if size.kind is not None:
                extra["rows"] = size.kind
            if size.fields is not None:
                extra["fields"] = list(size.fields)
            metas[name] = ArtifactMeta(type="dataset", rows=size.rows, tokens=tokens, extra=extra)
        return metas

    def check(self, cfg: DataSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> None:
        writes = foreign.builder_of(cfg).needs_model if foreign.is_foreign(cfg) else cfg.kind in WRITERS
        if writes and "model" not in inputs:
            fix = "data.inputs.model=model (or another model reference)"
            raise RecipeError(f"{cfg.kind} needs a model that writes", where="data.inputs", fix=fix)
        sources.sizes(cfg)
        if cfg.heldout_kind != "split":
            sources.heldout_documents(cfg)

    def estimate(self, cfg: DataSourceConfig, inputs: Mapping[str, ArtifactMeta]) -> Estimate:
        train, heldout = sources.sizes(cfg)
        disk = (train.bytes or 0) + (heldout.bytes or 0)
        data_tokens = None if train.bytes is None else train.bytes // BYTES_PER_TOKEN
        common = {"data_tokens": data_tokens, "disk_bytes": disk, "notes": _notes(cfg)}
        model = inputs.get("model")
        if cfg.kind not in WRITERS or model is None or model.architecture is None:
            return Estimate(**common)
        return _sampling_estimate(cfg, model.architecture, common)

    def run(self, ctx: StageContext) -> dict[str, Path]:
        cfg: DataSourceConfig = ctx.config
        try:
            split = sources.build(cfg, ctx)
        except RecipeError as error:
            raise StageError(problems=error.problems) from error
        folders = {}
        for name, documents in (("train", split.train), ("heldout", split.heldout)):
            folders[name] = ctx.output_dir(name)
            write_dataset(folders[name], documents, **_card(cfg, name))
            card = read_card(folders[name])
            ctx.record_result(**{f"{name}_{field}": card[field] for field in ("rows", "bytes", "sha256")})
        return folders

    def measure(self, name: str, path: Path, predicted: ArtifactMeta) -> ArtifactMeta:
        card = read_card(path)
        extra = {**predicted.extra, "bytes": card["bytes"], "sha256": card["sha256"], "licence": card["licence"]}
        extra |= {name: card[field] for name, field in (("rows", "kind"), ("fields", "fields")) if field in card}
        return replace(predicted, rows=card["rows"], tokens=card["bytes"] // BYTES_PER_TOKEN, extra=extra)


def _label(cfg: DataSourceConfig, split: str) -> str:
    if split == "heldout" and cfg.heldout_kind == "committed":
        return "posttrain held-out text"
    if split == "heldout" and cfg.heldout_kind == "path":
        return cfg.heldout_source_path.name
    return cfg.name


def _card(cfg: DataSourceConfig, split: str) -> dict[str, Any]:
    """The fields of `dataset.json` that are known before the text."""
    builder, licence = cfg.kind, sources.licence(cfg)
    if split == "heldout" and cfg.heldout_kind != "split":
        builder = "files" if cfg.heldout_kind == "path" else "committed"
        licence = sources.LICENCES["files"] if builder == "files" else committed.LICENCE
    card = {"name": _label(cfg, split), "split": split, "licence": licence, "builder": builder}
    return {**card, "external": sources.external(cfg), "settings": cfg.key_fields()}


def _notes(cfg: DataSourceConfig) -> tuple[str, ...]:
    if cfg.kind == "hub" and cfg.hub:
        notes = [f"the first {cfg.hub.max_rows:,} rows of {cfg.hub.name} will be streamed from the hub"]
        if not is_commit(cfg.hub.revision):
            revision = cfg.hub.revision or "main"
            notes.append(f"revision {revision} is not pinned: pin data.hub.revision=COMMIT for a repeatable key")
        return tuple(notes)
    if cfg.kind == "preference_pairs":
        return ("questions to which the model gives no wrong answer are left out: there may be fewer pairs",)
    if cfg.kind == "python_text" and (absent := sources.absent_packages(cfg)):
        return (f"without the text of {', '.join(absent)}: not installed here",)
    if cfg.kind == "files" and cfg.heldout_kind == "split" and sources.is_one_text(cfg):
        return ("one text file: its end is held out; give data.heldout_path for held-out documents of another source",)
    return ()


def _sampling_estimate(cfg: DataSourceConfig, architecture: dict[str, Any], common: dict[str, Any]) -> Estimate:
    from posttrain.models.architecture import cache_bytes, parameter_count

    samples = cfg.samples if cfg.kind == "teacher_samples" else cfg.pairs
    answers = samples.num_samples if cfg.kind == "teacher_samples" else cfg.gym.size * samples.tries
    element = 4 if samples.dtype == "float32" else 2
    length = samples.max_new_tokens + sources.PROMPT_TOKENS
    memory = {
        "weights": element * parameter_count(architecture),
        "cache": samples.batch_size * cache_bytes(architecture, length, element),
        "logits": 4 * 3 * samples.batch_size * architecture["vocab_size"],
    }
    tokens = answers * samples.max_new_tokens
    return Estimate(parameters=parameter_count(architecture), tokens=tokens, memory=memory, **common)
