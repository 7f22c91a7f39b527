"""Checkpoints that are either complete or not there.

A trainer writes `checkpoint-STEP/`, every file and the folder are flushed to disk, and only then a `COMPLETE` file with
size and CRC-32 of each file is put in. Resuming trusts that file and what it says, never a bare folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from posttrain.pipeline.files import list_files, read_json, sync_file, sync_folder, write_json

log = logging.getLogger(__name__)

FORMAT = 2
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
    sums = dict(zip(files, checksums(list(files.values())), strict=True))
    facts = {name: {"size": path.stat().st_size, "crc32": sums[name]} for name, path in files.items()}
    write_json(checkpoint / MARKER, {"format": FORMAT, "step": step_of(checkpoint), "files": facts})


def checksums(files: list[Path]) -> list[int]:
    """CRC-32 of every file, large ones side by side: 3 GB/s each, where a SHA-256 has half of that."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(_crc32, files))


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(8 * 2**20):
            found = zlib.crc32(block, found)
    return found


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
    """Why a checkpoint cannot be used, or None: no marker, a file missing, of another size or with other content."""
    marker = checkpoint / MARKER
    if not marker.is_file():
        return "half-written (no COMPLETE file)"
    try:
        content = read_json(marker)
        facts = {name: (int(fact["size"]), int(fact["crc32"])) for name, fact in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its COMPLETE file cannot be read"
    for name, (size, _) in facts.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if path.suffix == ".safetensors" and (problem := safetensors_problem(path)):
            return f"{name}: {problem}"
    for name, found in zip(facts, checksums([checkpoint / name for name in facts]), strict=True):
        if found != facts[name][1]:
            return f"the content of {name} is not what was written"
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
