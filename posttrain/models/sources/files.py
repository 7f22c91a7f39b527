"""Which files make up a model, and how they are copied into the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "*.py")
"""Weights, configs, tokenizer, chat template, and the code that a model of our own classes carries (never run)."""

WITHOUT_CODE = tuple(pattern for pattern in MODEL_FILES if pattern != "*.py")

NOT_OF_A_MODEL = (
    "consolidated*",  # a second copy of the weights that some hub models carry
    "trainer_state.json",
    "*_results.json",
)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that make up the model, sorted; optimiser states and logs are not among them."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(fnmatch(path.name, pattern) for pattern in NOT_OF_A_MODEL))


def place(files: Iterable[Path], target: Path, *, link: bool, report: Callable[[int, int], None] | None = None) -> None:
    """Put the files into `target` under their own names, replacing what is there.

    Args:
        link: hard-link where the file system can; only for files that nobody changes in place.
        report: called with (bytes done, bytes in all) after every file.
    """
    # shutil loads the compression libraries, which a plan should not wait for.
    from shutil import copyfile

    paths = list(files)
    total, done = sum(path.stat().st_size for path in paths), 0
    target.mkdir(parents=True, exist_ok=True)
    for path in paths:
        destination = target / path.name
        destination.unlink(missing_ok=True)
        if not (link and _linked(path, destination)):
            copyfile(path, destination)
        done += path.stat().st_size
        if report is not None:
            report(done, total)


def _linked(path: Path, destination: Path) -> bool:
    try:
        os.link(path.resolve(), destination)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            return False
        raise
    return True
