"""Work done batch by batch and kept: a builder that is stopped goes on behind its last finished batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.pipeline.context import StageContext

PARTIAL = "partial.jsonl"


def in_batches(
    ctx: StageContext,
    batches: Sequence[list[Any]],
    prepare: Callable[[], Callable[[int], list[Any]]],
    file_name: str = PARTIAL,
) -> list[Any]:
    """The results of all items, one after the other; every finished batch is in a file of the work folder.

    Args:
        prepare: called if something is left to do, e.g. to load a model; gives the function from a batch's number to
            its results, one an item, JSON-able. It must depend on nothing but that number and the stage's settings.

    Raises:
        StopRequested: a stop was asked for; the finished batches are kept.
    """
    partial = ctx.work_dir / file_name
    results = _finished(partial, batches)
    if len(results) < len(batches):
        work = prepare()
        with partial.open("a", encoding="utf-8") as file:
            for number in range(len(results), len(batches)):
                ctx.progress(number, len(batches), unit="batch")
                if ctx.should_stop():
                    ctx.stop(number)
                found = work(number)
                file.write(json.dumps({"batch": number, "answers": found}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
                results.append(found)
        ctx.progress(len(batches), len(batches), unit="batch")
    return [result for batch in results for result in batch]


def cut(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of `size` items, the last one smaller."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def batch_seed(name: str, *numbers: int) -> int:
    """A seed of that batch's own."""
    text = "/".join([name, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _finished(partial: Path, batches: Sequence[list[Any]]) -> list[list[Any]]:
    """Results of the batches that an earlier attempt finished; the file is cut behind the last whole one."""
    if not partial.is_file():
        return []
    answers: list[list[Any]] = []
    good = 0
    for raw in partial.read_bytes().splitlines(keepends=True):
        try:
            entry = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            entry = None
        number = len(answers)
        if entry is None or entry["batch"] != number or len(entry["answers"]) != len(batches[number]):
            break
        answers.append(entry["answers"])
        good += len(raw)
    os.truncate(partial, good)
    return answers
