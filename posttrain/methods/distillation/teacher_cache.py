"""What was kept of the teacher, on disk: shards of whole sequences that are either complete or not there.

A shard is written aside, flushed and renamed, and says in its own metadata which teacher, tokens and settings it is of
(`identity`); `COMPLETE`, with the size of every shard, comes last. An interrupted pass goes on after the shards it
finds; those of another identity are removed. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.methods.distillation.topk import TopK
from posttrain.pipeline.files import read_json, sync_file, sync_folder, write_json
from posttrain.training.checkpoints import MARKER, safetensors_problem

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
"""About the size of a shard: what a kill can lose, and few enough files for a long run."""
OPEN_SHARDS = 256
ABOUT = "posttrain"
"""Entry of a shard's metadata: its identity, the sum of the mass kept, and over how many tokens."""


class TopKCache:
    """The kept tokens of a run's sequences; `cache[row]` are those of one, by its number in the training data.

    Args:
        folder: a complete cache, see `fill`.
        rows: numbers of the sequences it holds, ascending `[R]`.
    """

    def __init__(self, folder: Path, rows: Tensor, per_shard: int) -> None:
        self.folder, self.rows, self.per_shard = folder, rows, per_shard
        done = read_json(folder / MARKER)
        self.mass: float = done["mass"]
        """Mean over all tokens that are trained of the probability that the kept tokens have."""
        self.bytes: int = sum(done["files"].values())
        self._open = functools.lru_cache(OPEN_SHARDS)(lambda path: safe_open(path, framework="pt"))

    def __getitem__(self, row: int) -> TopK:
        """`[T, k]` int32 and `[T, k + 1]` as stored."""
        place = int(torch.searchsorted(self.rows, row))
        if place >= len(self.rows) or int(self.rows[place]) != row:
            raise IndexError(f"sequence {row} is not in the teacher's cache")
        shard, at = divmod(place, self.per_shard)
        file = self._open(shard_path(self.folder, shard))
        return TopK(*(file.get_slice(name)[at : at + 1][0] for name in TopK._fields))


def identity_of(inputs: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What decides the content: settings and digests in `inputs`, and the SHA-256 of the tensors that are read."""
    return {"format": 1, **inputs, **{name: _digest(tensor) for name, tensor in tensors.items()}}


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's shape and values."""
    found = hashlib.sha256(repr(list(tensor.shape)).encode())
    found.update(tensor.contiguous().numpy())
    return found.hexdigest()


def rows_per_shard(length: int, bytes_per_token: int) -> int:
    """Sequences of `length` tokens in a shard."""
    return max(1, SHARD_BYTES // (length * bytes_per_token))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def is_complete(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Whether all shards are there, of that identity and of the size they were written in."""
    try:
        done = read_json(folder / MARKER)
        files = dict(done["files"])
        return done["identity"] == identity and all((folder / name).stat().st_size == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fill(
    folder: Path,
    identity: Mapping[str, Any],
    rows: int,
    per_shard: int,
    compute: Callable[[range], tuple[TopK, Tensor]],
) -> None:
    """Write the shards that are missing, then the marker.

    Args:
        compute: what is kept of sequences by their place, `[n, T, k]` and `[n, T, k + 1]`, on a CPU and in the stored
            type, and the mass kept at every token that counts, `[m]`. It may raise to stop: whole shards stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _discard_unusable(folder, identity)
    sums, files = [], {}
    for shard, start in enumerate(range(0, rows, per_shard)):
        path = shard_path(folder, shard)
        if (found := _sums(path, identity)) is None:
            kept, mass = compute(range(start, min(start + per_shard, rows)))
            found = float(mass.double().sum()), len(mass)
            _write(path, kept, {"identity": dict(identity), "mass": found[0], "tokens": found[1]})
        sums.append(found)
        files[path.name] = path.stat().st_size
    mass = sum(total for total, _ in sums) / max(sum(count for _, count in sums), 1)
    write_json(folder / MARKER, {"format": 1, "identity": dict(identity), "files": files, "mass": mass})


def _write(path: Path, kept: TopK, about: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.aside")
    # One entry: safetensors writes several in an order that differs from run to run.
    metadata = {ABOUT: json.dumps(about, sort_keys=True)}
    save_file({name: tensor.contiguous() for name, tensor in kept._asdict().items()}, aside, metadata=metadata)
    sync_file(aside)
    os.replace(aside, path)
    sync_folder(path.parent)


def _sums(path: Path, identity: Mapping[str, Any]) -> tuple[float, int] | None:
    """Mass and tokens of a shard that can be used as it is, or None."""
    if not path.is_file() or safetensors_problem(path):
        return None
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    return (about["mass"], about["tokens"]) if about.get("identity") == identity else None


def _discard_unusable(folder: Path, identity: Mapping[str, Any]) -> None:
    (folder / MARKER).unlink(missing_ok=True)
    for leftover in folder.glob(".*.aside"):
        leftover.unlink()
    unusable = [path for path in sorted(folder.glob("shard-*")) if _sums(path, identity) is None]
    for path in unusable:
        path.unlink()
    if unusable:
        log.warning(
            "%d shards of the teacher's cache are damaged, or of another teacher, text or setting: not used",
            len(unusable),
        )
