"""From a `data:` section to documents: what can be known at plan time, and the builders that run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.data import foreign, tasks
from posttrain.data.builders import (
    committed,
    files,
    hub,
    preference_pairs,
    python_text,
    reasoning_gym,
    teacher_samples,
    tiny,
)
from posttrain.data.config import GYM_BUILDERS, DataSourceConfig
from posttrain.data.documents import BYTES_PER_TOKEN, Document, kinds, limited, shared_fields, split_documents, too_few
from posttrain.data.problems import ANSWER
from posttrain.errors import RecipeError
from posttrain.pipeline.context import StageContext
from posttrain.rewards import plugin

CHECKED_AT_PLAN = 64 << 20
"""Files up to this size, bytes, are read through by a plan; larger ones are checked when the stage runs."""

ANSWER_SHARE = 0.6
"""Length of a sampled answer over the longest allowed, for estimates."""

PROMPT_TOKENS = 64
"""A built-in prompt with its chat template, for estimates."""

LICENCES = {
    "files": "as you hold it",
    "tiny": "Apache-2.0",
    "python_text": python_text.LICENCE,
    "teacher_samples": teacher_samples.LICENCE,
    "reasoning_gym": reasoning_gym.LICENCE,
    "preference_pairs": preference_pairs.LICENCE,
}

FIELDS = {"python_text": (), "teacher_samples": (), "preference_pairs": ("chosen", "prompt", "rejected", tasks.TASK)}
"""Builder to the fields of all its rows, where they do not depend on its settings."""

KINDS = {"teacher_samples": "messages", "reasoning_gym": "messages", "preference_pairs": "preference"}
"""Builder to the kind of its rows, where it makes one kind alone."""


@dataclass(frozen=True)
class Size:
    """Documents, bytes of text, kinds of rows and the fields that all have beside text and turns; None: unknown."""

    rows: int | None = None
    bytes: int | None = None
    kind: str | None = None
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Split:
    """The documents of both outputs and where the held-out ones come from."""

    train: list[Document]
    heldout: list[Document]


def read_source(cfg: DataSourceConfig) -> list[Document]:
    """Documents of the user's files; a lone text file that must be split is cut into pieces."""
    documents = files.read_files(cfg.source_path, cfg.text_field, cfg.document_field, f"data.path={cfg.path}")
    if cfg.heldout_kind == "split" and files.is_lone_text(cfg.source_path):
        return files.cut_text(documents[0])
    return documents


def build(cfg: DataSourceConfig, ctx: StageContext) -> Split:
    """Both splits.

    Raises:
        RecipeError: the files are not usable, or there are too few documents.
    """
    if cfg.kind in GYM_BUILDERS:
        return _generated(cfg, ctx)
    makers: dict[str, Callable[[], list[Document]]] = {
        "files": lambda: read_source(cfg),
        "tiny": tiny.build,
        "python_text": lambda: limited(python_text.build(cfg.python.packages), None, cfg.python.max_bytes),
        "hub": lambda: hub.build(cfg, ctx),
        "teacher_samples": lambda: teacher_samples.build(cfg.samples, ctx),
    }
    if foreign.is_foreign(cfg):
        return divide(cfg, foreign.documents(cfg, ctx))
    return divide(cfg, makers[cfg.kind]())


def _generated(cfg: DataSourceConfig, ctx: StageContext) -> Split:
    """Generated problems, held out by their seeds unless other held-out text is wanted."""
    tasks.check_tasks(cfg.gym, "data")
    share = cfg.heldout_fraction if cfg.heldout_kind == "split" else 0.0
    if cfg.kind == "reasoning_gym":
        train, heldout = reasoning_gym.build(cfg.gym, share, ctx)
    else:
        train, heldout = preference_pairs.build(cfg.gym, cfg.pairs, share, ctx)
    if not train or (share and not heldout):
        raise too_few(len(train) + len(heldout), _where(cfg))
    if not share:
        return divide(cfg, train)
    return Split(limited(train, cfg.max_rows, cfg.max_bytes), heldout)


def divide(cfg: DataSourceConfig, documents: list[Document]) -> Split:
    """Training and held-out documents of what a builder made.

    A document that is held out elsewhere (`heldout_path`, committed) is not trained on.
    """
    if not documents:
        raise too_few(0, _where(cfg))
    if cfg.heldout_kind == "split":
        train, heldout = _split_own(cfg, documents)
    else:
        heldout = heldout_documents(cfg)
        held = {document.text for document in heldout}
        train = [document for document in documents if document.text not in held]
        if not train:
            raise RecipeError(
                "every document is also in the held-out text: nothing is left to train on",
                where=_where(cfg),
                fix="give other held-out text: data.heldout_path=FILE, or leave it out to have documents held out",
            )
    return Split(limited(train, cfg.max_rows, cfg.max_bytes), heldout)


def heldout_documents(cfg: DataSourceConfig) -> list[Document]:
    """Held-out documents that come from elsewhere."""
    if cfg.heldout_kind == "committed":
        return committed.build()
    where = f"data.heldout_path={cfg.heldout_path}"
    return files.read_files(cfg.heldout_source_path, cfg.text_field, cfg.document_field, where)


def is_one_text(cfg: DataSourceConfig) -> bool:
    """True when the data is one text file, which is cut to be split."""
    return cfg.kind == "files" and files.is_lone_text(cfg.source_path)


def sizes(cfg: DataSourceConfig) -> tuple[Size, Size]:
    """Size of the training and held-out text, as far as a plan can know it. Raises RecipeError for unusable files."""
    if cfg.kind == "tiny" or (cfg.kind == "files" and _small(cfg.source_path, f"data.path={cfg.path}")):
        made = divide(
            cfg, tiny.build() if cfg.kind == "tiny" else _read_cached(cfg.model_dump_json(), _state(cfg.source_path))
        )
        return _size(made.train), _size(made.heldout)
    total, made = _expected_bytes(cfg), Size(kind=row_kind(cfg), fields=row_fields(cfg))
    if total is None:
        held = made if cfg.heldout_kind == "split" else _size(heldout_documents(cfg))
        return replace(made, bytes=cfg.max_bytes), held
    if cfg.heldout_kind != "split":
        return replace(made, rows=_rows(cfg, 0.0), bytes=_capped(cfg, total)), _size(heldout_documents(cfg))
    held = int(total * cfg.heldout_fraction)
    rows = _rows(cfg, cfg.heldout_fraction)
    heldout_rows = None if rows is None else tasks.heldout_size(cfg.gym.size, cfg.heldout_fraction)
    return (
        replace(made, rows=rows, bytes=_capped(cfg, total - held)),
        replace(made, rows=heldout_rows, bytes=held),
    )


def row_kind(cfg: DataSourceConfig) -> str | None:
    """The kind of all rows, where the builder makes one kind alone."""
    if cfg.kind == "hub" and cfg.hub and cfg.hub.question_field:
        return "messages"
    return foreign.builder_of(cfg).rows if foreign.is_foreign(cfg) else KINDS.get(cfg.kind)


def row_fields(cfg: DataSourceConfig) -> tuple[str, ...] | None:
    """The fields of all rows beside text and turns, where the settings say."""
    if cfg.kind == "reasoning_gym":
        return tuple(sorted(reasoning_gym.row_fields(cfg.gym)))
    if cfg.kind == "hub" and cfg.hub and cfg.hub.answer_field:
        return (ANSWER,)
    return FIELDS.get(cfg.kind)


def licence(cfg: DataSourceConfig) -> str:
    """Of the text that the section makes."""
    if foreign.is_foreign(cfg):
        return foreign.builder_of(cfg).licence
    return LICENCES.get(cfg.kind) or (cfg.hub.licence if cfg.hub else "")


def absent_packages(cfg: DataSourceConfig) -> list[str]:
    """The named packages that are not installed, and whose text is therefore left out."""
    return [
        name for name, version in python_text.versions(cfg.python.packages).items() if version == python_text.ABSENT
    ]


def external(cfg: DataSourceConfig) -> dict[str, Any]:
    """Digest of every file and version that decides the text."""
    from posttrain.pipeline.fingerprint import digest_path

    found: dict[str, Any] = {}
    if cfg.kind == "files":
        found["files"] = _digests(cfg.source_path, f"data.path={cfg.path}", digest_path)
        if cfg.heldout_kind == "split" and is_one_text(cfg):
            found["pieces"] = files.PIECES
        # Rows once lost these fields: artifacts from then must not be taken for those that have them.
        if named := files.named_fields(cfg.source_path):
            found["fields"] = named
    if cfg.kind == "python_text":
        found["python"] = platform.python_version()
        found["packages"] = python_text.versions(cfg.python.packages)
    if cfg.kind in GYM_BUILDERS:
        tasks.require_package(_where(cfg))
        found["reasoning_gym"] = tasks.package_version()
    if cfg.kind == "preference_pairs" and cfg.pairs.reward is not None:
        found["reward"] = plugin.identity(cfg.pairs.reward, "data.pairs.reward")
    if foreign.is_foreign(cfg):
        found["builder"] = foreign.identity(cfg)
    if cfg.heldout_kind == "path":
        where = f"data.heldout_path={cfg.heldout_path}"
        found["heldout_files"] = _digests(cfg.heldout_source_path, where, digest_path)
        if named := files.named_fields(cfg.heldout_source_path):
            found["heldout_fields"] = named
    if cfg.heldout_kind == "committed":
        found["heldout_files"] = {"heldout.jsonl": digest_path(committed.committed_file())}
    return found


def _split_own(cfg: DataSourceConfig, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    if is_one_text(cfg):
        # Pieces of one text: hold out its end, so that no held-out piece lies between two that are trained on.
        if len(documents) < 2:
            raise too_few(len(documents), _where(cfg))
        held = max(1, round(len(documents) * cfg.heldout_fraction))
        train, heldout = documents[:-held], documents[-held:]
        # What is held out of a short text is one piece: evaluations need two documents at least.
        return train, heldout if held > 1 else files.cut_text(heldout[0], len(heldout[0].text) // 2)
    return split_documents(documents, cfg.heldout_fraction, _where(cfg))


def _digests(path: Path, where: str, digest_path: Callable[[Path], str]) -> dict[str, str]:
    root = path if path.is_dir() else path.parent
    return {file.relative_to(root).as_posix(): digest_path(file) for file in files.text_files(path, where)}


def _where(cfg: DataSourceConfig) -> str:
    return f"data.path={cfg.path}" if cfg.kind == "files" else f"data.builder={cfg.builder}"


def _small(path: Path, where: str) -> bool:
    return sum(file.stat().st_size for file in files.text_files(path, where)) <= CHECKED_AT_PLAN


def _state(path: Path) -> tuple[tuple[str, int, int], ...]:
    found = files.text_files(path, str(path))
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found)


@lru_cache(maxsize=4)
def _read_cached(cfg_json: str, state: tuple[tuple[str, int, int], ...]) -> list[Document]:
    """`read_source`, once for each state of the files: a plan asks for it several times."""
    return read_source(DataSourceConfig.model_validate_json(cfg_json))


def _expected_bytes(cfg: DataSourceConfig) -> int | None:
    if foreign.is_foreign(cfg):
        return foreign.builder_of(cfg).size(cfg.settings)
    if cfg.kind == "files":
        return sum(file.stat().st_size for file in files.text_files(cfg.source_path, f"data.path={cfg.path}"))
    if cfg.kind == "python_text":
        return min(python_text.expected_bytes(cfg.python.packages), cfg.python.max_bytes or sys.maxsize)
    if cfg.kind == "teacher_samples":
        return int(cfg.samples.num_samples * cfg.samples.max_new_tokens * ANSWER_SHARE * BYTES_PER_TOKEN)
    if cfg.kind in GYM_BUILDERS:
        tasks.check_tasks(cfg.gym, "data")
        return cfg.gym.size * (tasks.typical_bytes(cfg.gym) + reasoning_gym.format_bytes(cfg.gym))
    assert cfg.hub is not None
    return cfg.hub.max_rows * 4000


def _rows(cfg: DataSourceConfig, heldout_fraction: float) -> int | None:
    """Training rows where the settings say how many there will be, at most."""
    if cfg.kind not in GYM_BUILDERS:
        return None
    held = tasks.heldout_size(cfg.gym.size, heldout_fraction)
    return min(cfg.gym.size - held, cfg.max_rows or cfg.gym.size)


def _capped(cfg: DataSourceConfig, size: int) -> int:
    return size if cfg.max_bytes is None else min(size, cfg.max_bytes)


def _size(documents: list[Document]) -> Size:
    size = sum(len(document.text.encode()) for document in documents)
    return Size(len(documents), size, kinds(documents), tuple(shared_fields(documents)))
