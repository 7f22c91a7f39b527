"""The first rows of a data set on the Hugging Face hub, streamed."""

from __future__ import annotations

import os

from posttrain.data.builders.files import row_document
from posttrain.data.config import DataSourceConfig
from posttrain.data.documents import Document
from posttrain.errors import PosttrainError, StageError
from posttrain.pipeline.context import StageContext


def build(cfg: DataSourceConfig, ctx: StageContext) -> list[Document]:
    """Stream `hub.max_rows` rows; nothing is kept of an interrupted download, since a stream is cheap to start anew.

    Raises:
        StageError: the hub cannot be reached, or a row has no text.
    """
    assert cfg.hub is not None
    documents: list[Document] = []
    try:
        for number, row in enumerate(_stream(cfg)):
            if number >= cfg.hub.max_rows:
                break
            where = f"{cfg.hub.name} [{cfg.hub.split}] row {number}"
            document = row_document(row, str(number), cfg.text_field, cfg.document_field, where)
            if document.text.strip():
                documents.append(document)
            ctx.progress(number + 1, cfg.hub.max_rows, unit="row")
            if ctx.should_stop():
                ctx.stop(number + 1)
    except PosttrainError as error:
        raise StageError(problems=error.problems) from error
    return documents


def _stream(cfg: DataSourceConfig):
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    assert cfg.hub is not None
    where = f"data.hub.name={cfg.hub.name}"
    try:
        dataset = load_dataset(
            cfg.hub.name, cfg.hub.config, split=cfg.hub.split, revision=cfg.hub.revision, streaming=True
        )
        yield from dataset
    except DatasetNotFoundError as error:
        fix = "check the spelling; a gated or private data set needs `hf auth login` (or HF_TOKEN)"
        raise StageError(f"the hub has no data set {cfg.hub.name!r} for you", where=where, fix=fix) from error
    except ValueError as error:
        raise StageError(_first_line(error), where=where, fix="data.hub.config=…, data.hub.split=…") from error
    except OSError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        hint = "HF_HUB_OFFLINE is set: unset it" if offline else "check the network (HF_ENDPOINT names a mirror)"
        raise StageError(
            f"the hub cannot be reached for {cfg.hub.name} ({_first_line(error)})",
            where=where,
            fix=f"{hint}; or use files of yours: data.path=FILE; or data=demo_text (no hub needed)",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
