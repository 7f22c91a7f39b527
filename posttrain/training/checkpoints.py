"""Checkpoints that are either complete or not there.

A trainer writes `checkpoint-STEP/`, every file and the folder are flushed to disk, and only then a `COMPLETE` file with
the size of each file is put in. Resuming trusts that file and what it says, never a bare folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from posttrain.pipeline.files import list_files, read_json, sync_file, sync_folder, write_json

log = logging.getLogger(__name__)

MARKER = "COMPLETE"
PREFIX = "checkpoint-"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after that optimiser step lies."""
    return folder / f"{PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    """The optimiser step a checkpoint was written after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def begin(folder: Path, step: int) -> Path:
    """The path for a new checkpoint, free of what an interrupted save may have left there."""
    path = checkpoint_path(folder, step)
    discard(path)
    return path


def complete(checkpoint: Path) -> None:
    """Flush a written checkpoint to disk, then mark it complete. Until this returns, resuming does not see it."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    files = list_files(checkpoint)
    for path in files.values():
        sync_file(path)
    for parent in sorted({path.parent for path in files.values()}):
        sync_folder(parent)
    sync_folder(checkpoint.parent)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_json(checkpoint / MARKER, {"format": 1, "step": step_of(checkpoint), "files": sizes})


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a half-deleted one is never taken for complete."""
    if checkpoint.is_dir():
        (checkpoint / MARKER).unlink(missing_ok=True)
        sync_folder(checkpoint)
        shutil.rmtree(checkpoint)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints; call it after `complete` only."""
    marked = [path for path in checkpoints(folder) if (path / MARKER).is_file()]
    for path in marked[keep:]:
        discard(path)


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, complete or not, newest step first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and path.name[len(PREFIX) :].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def newest_complete(folder: Path, say: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint that is complete, or None to start over.

    Half-written and damaged newer ones are deleted and `say` is told of each: going back costs time, not the result.
    """
    for path in checkpoints(folder):
        problem = find_problem(path)
        if problem is None:
            return path
        say(f"checkpoint of step {step_of(path)} is not used and deleted: {problem}")
        discard(path)
    return None


def find_problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: no marker, a file missing or of another size, a broken safetensors."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return "half-written (no COMPLETE file)"
    try:
        sizes = dict(read_json(marker)["files"])
    except (ValueError, KeyError, TypeError):
        return "its COMPLETE file cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if path.suffix == ".safetensors" and (problem := safetensors_problem(path)):
            return f"{name}: {problem}"
    return None


def safetensors_problem(path: Path) -> str | None:
    """Why a safetensors file cannot be whole, from its header and size, or None."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length + 8 > size:
            return "truncated header"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "unreadable header"
    expected = 8 + length + max(ends, default=0)
    return None if size == expected else f"{size} bytes instead of {expected}"
