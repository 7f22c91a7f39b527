"""The `selection` artifact: which layers stay attention, and what was measured to choose them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import StageError
from posttrain.pipeline.files import read_json, write_json
from posttrain.pipeline.stage import ArtifactMeta

SELECTION = "selection.json"


def write_selection(folder: Path, selection: Mapping[str, Any]) -> None:
    """`kept` layers, `layers` of the model, `method`, and what was measured."""
    write_json(folder / SELECTION, {"format": 1, **selection})


def read_selection(folder: Path) -> dict[str, Any]:
    """The selection of an artifact folder. Raises StageError: it is none."""
    try:
        found = read_json(folder / SELECTION)
        if not all(isinstance(index, int) for index in found["kept"]):
            raise TypeError("kept")
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"no selection of layers: {error}", where=str(folder), fix="posttrain verify RUN") from error


def selection_meta(kept: list[int], layers: int, *, predicted: bool = False) -> ArtifactMeta:
    """`predicted`: as many layers as will be kept, but which ones is not known yet."""
    extra: dict[str, Any] = {"kept": list(kept), "layers": layers}
    if predicted:
        extra["open"] = ["kept"]
    return ArtifactMeta("selection", extra=extra)
