"""Fetch a model from the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from posttrain.errors import StageError
from posttrain.models.sources.files import MODEL_FILES, NOT_OF_A_MODEL, WITHOUT_CODE


def fetch(name: str, revision: str, *, with_code: bool = False) -> Path:
    """Download a hub model into the hub's own cache, or find it there. The folder's name is the resolved commit.

    Raises:
        StageError: the hub cannot be reached, or it refuses; the message says what to do.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(MODEL_FILES if with_code else WITHOUT_CODE),
            ignore_patterns=[*NOT_OF_A_MODEL, "*/*"],
        )
    except errors.GatedRepoError as error:
        fix = f"accept its terms on the hub's page of {name}, then `hf auth login` (or set HF_TOKEN)"
        raise StageError(f"the hub model {name} is gated", where=f"model.hub={name}", fix=fix) from error
    except errors.RevisionNotFoundError as error:
        raise StageError(f"{name} has no revision {revision!r}", where=f"model.revision={revision}") from error
    except errors.RepositoryNotFoundError as error:
        fix = "check the spelling; a private model needs `hf auth login` (or HF_TOKEN)"
        raise StageError(f"the hub has no model {name!r}", where=f"model.hub={name}", fix=fix) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise StageError(
            f"{name} is not in the local hub cache and the hub cannot be reached ({_first_line(error)})",
            where=f"model.hub={name}",
            fix=f"{_offline_hint()}; or use a copy of yours: model.path=FOLDER; or model=smollm2_135m (no hub needed)",
        ) from error
    return Path(folder)


def cached(name: str, revision: str) -> Path | None:
    """The snapshot of that revision in the local hub cache, None without one. Imports nothing of the hub's."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").exists() else None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit hash, which always means the same files."""
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def _offline_hint() -> str:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return f"{variable} is set: unset it"
    return "check the network (HF_ENDPOINT names a mirror)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
