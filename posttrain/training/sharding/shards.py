"""Checkpoints in shards: every rank writes what it owns, a run with other ranks reads what it needs.

`shard_RRRR.safetensors` holds a rank's pieces of trained parameters and of AdamW's moments as flat fp32 tensors
(`value/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`); `shard_RRRR.json` says which elements of the flattened parameter they
are. Frozen parameters are not in it: they are those of the stage's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import StageError
from posttrain.pipeline.files import read_json, write_json
from posttrain.training.sharding.base import MOMENTS, Piece

FORMAT = 1
VALUE = "value"


def shard_name(rank: int) -> str:
    """File name of a rank's shard, without its ending."""
    return f"shard_{rank:04d}"


def write_shard(
    folder: Path, pieces: Sequence[Piece], *, rank: int, world_size: int, strategy: str, steps: int
) -> None:
    """Write what this rank owns."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for piece in pieces:
        index[piece.name] = {"shape": list(piece.shape), "start": piece.start, "length": piece.value.numel()}
        for key, tensor in {VALUE: piece.value, **piece.moments}.items():
            tensors[f"{key}/{piece.name}"] = tensor.detach().to("cpu", copy=True)
    save_file(tensors, folder / f"{shard_name(rank)}.safetensors", metadata={"format": "pt"})
    facts = {"format": FORMAT, "strategy": strategy, "rank": rank, "world_size": world_size, "steps": steps}
    write_json(folder / f"{shard_name(rank)}.json", {**facts, "pieces": index})


class Shards:
    """The shards of a checkpoint, read by parameter and range.

    Raises:
        StageError: they are not all there, or do not cover every element once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        first = read_json(folder / f"{shard_name(0)}.json")
        self.world_size, self.steps = first["world_size"], first["steps"]
        self._owners: dict[str, list[tuple[int, int, int]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(self.world_size):
            index = first if rank == 0 else read_json(folder / f"{shard_name(rank)}.json")
            for name, piece in index["pieces"].items():
                self.shapes[name] = tuple(piece["shape"])
                if piece["length"]:
                    self._owners.setdefault(name, []).append((piece["start"], piece["length"], rank))
        for name, shape in self.shapes.items():
            self._require_all(name, shape)
        self._files: dict[int, Any] = {}

    def _require_all(self, name: str, shape: Sequence[int]) -> None:
        at = 0
        for start, length, _ in sorted(self._owners.get(name, [])):
            if start != at:
                break
            at += length
        else:
            if at == torch.Size(shape).numel():
                return
        raise StageError(f"the shards do not hold every element of {name} once", where=str(self.folder))

    def read(self, key: str, name: str, start: int, length: int) -> Tensor:
        """Elements `start` to `start + length` of a flattened parameter or moment."""
        parts = []
        for at, count, rank in sorted(self._owners[name]):
            first, last = max(start, at), min(start + length, at + count)
            if first < last:
                parts.append(self._file(rank).get_slice(f"{key}/{name}")[first - at : last - at])
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str) -> Tensor:
        """A whole parameter."""
        shape = self.shapes[name]
        return self.read(VALUE, name, 0, torch.Size(shape).numel()).view(shape)

    def _file(self, rank: int) -> Any:
        if rank not in self._files:
            self._files[rank] = safe_open(self.folder / f"{shard_name(rank)}.safetensors", framework="pt")
        return self._files[rank]


def read_weights(folder: Path, trained: Mapping[str, torch.nn.Parameter]) -> None:
    """Fill a model that is not sharded yet with the weights of a checkpoint.

    Raises:
        StageError: the checkpoint is of other parameters.
    """
    shards = Shards(folder)
    expected = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    if expected != shards.shapes:
        other = sorted(expected.items() ^ shards.shapes.items())
        raise StageError(f"the checkpoint holds other parameters than are trained, e.g. {other[0]}", where=str(folder))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(shards.whole(name))


def read_moments(folder: Path, pieces: Sequence[Piece]) -> None:
    """Fill the moments of this rank's pieces."""
    shards = Shards(folder)
    for piece in pieces:
        for key in MOMENTS:
            piece.moments[key].copy_(shards.read(key, piece.name, piece.start, piece.value.numel()))
