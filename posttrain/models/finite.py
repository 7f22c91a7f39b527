"""Whether a model's weights are numbers, read from its files: no torch, no model in memory."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.errors import StageError

CHUNK = 2**22


def check_numbers(folder: Path, source: Path) -> None:
    """Look at every weight of a folder that was taken from `source`.

    Raises:
        StageError: one is NaN or infinite, which whoever computes with the model would blame on something else.
    """
    for file in sorted(folder.glob("*.safetensors")):
        if (tensor := first_non_finite(file)) is not None:
            raise StageError(
                f"tensor {tensor} of the model has NaN or infinite numbers",
                where=str(source / file.name),
                fix="take the model as it was before its training diverged, or copy it again",
            )


def first_non_finite(file: Path) -> str | None:
    """The first tensor of a safetensors file with a NaN or an infinity, read in pieces; None if there is none.

    Broken files are not looked at: `check_model_folder` says what is wrong with them.
    """
    import numpy

    kinds = {"F64": numpy.float64, "F32": numpy.float32, "F16": numpy.float16, "BF16": numpy.uint16}
    with file.open("rb") as stream:
        try:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        except (ValueError, MemoryError, OverflowError):
            return None
        for name, entry in header.items():
            if name == "__metadata__" or entry.get("dtype") not in kinds:
                continue
            begin, end = entry["data_offsets"]
            stream.seek(8 + length + begin)
            while begin < end:
                block = stream.read(min(CHUNK, end - begin))
                if not block:
                    return None
                begin += len(block)
                numbers = numpy.frombuffer(block, kinds[entry["dtype"]])
                # bf16 has no type here: all bits of the exponent set means no finite number.
                bad = (numbers & 0x7F80) == 0x7F80 if entry["dtype"] == "BF16" else ~numpy.isfinite(numbers)
                if bad.any():
                    return name
    return None
