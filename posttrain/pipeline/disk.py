"""A disk that is full or cannot be written: recognised in whatever form, said once, with room to say it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from posttrain.errors import StageError

RESERVE = ".reserve"
RESERVE_BYTES = 256 * 1024
"""What a run and a work folder keep back, so that a failure on a full disk can still be written down."""
FULL_BELOW = 2**20
"""Free bytes under which a write that failed without saying why failed for want of space."""

_KINDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not be that large here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "the folder may not be written",
    errno.EPERM: "the folder may not be written",
    errno.EIO: "the disk gives input/output errors",
}
_FIXES = {
    errno.ENOSPC: "make room (`posttrain clean` shows what nobody needs), then go on with: posttrain resume",
    errno.EDQUOT: "make room (`posttrain clean` shows what nobody needs), then go on with: posttrain resume",
    errno.EIO: "look at the disk (dmesg), choose another with paths.outputs=FOLDER",
}
_FAILED_WRITES = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos", re.IGNORECASE)


def keep_reserve(folder: Path) -> None:
    """Set some space aside in a folder; without space for it there is none to keep."""
    path = folder / RESERVE
    with contextlib.suppress(OSError):
        if not path.exists() or path.stat().st_size != RESERVE_BYTES:
            # Written, not truncated to size: a hole takes no space.
            path.write_bytes(os.urandom(RESERVE_BYTES))


def free_reserve(folder: Path) -> None:
    """Give the space back, for what must be written now."""
    with contextlib.suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)


def disk_error(error: BaseException, folder: Path) -> StageError | None:
    """The failure as what it is, if a disk is to blame; None otherwise.

    safetensors and torch report a failed write as errors of their own, the latter without its reason.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = _code(seen, folder)
        if code is not None:
            place = getattr(seen, "filename", None) or folder
            fix = _FIXES.get(
                code, "choose another place with paths.outputs=FOLDER, or give yourself the right to write"
            )
            what = f"{_KINDS[code]}: {error_line(seen)}"
            return StageError(what, str(place), fix)
        seen = seen.__cause__
    return None


def _code(error: BaseException, folder: Path) -> int | None:
    if isinstance(error, OSError) and error.errno in _KINDS:
        return error.errno
    text = str(error)
    if (found := re.search(r"os error (\d+)", text)) and int(found[1]) in _KINDS:
        return int(found[1])
    if _FAILED_WRITES.search(text) and _free(folder) < FULL_BELOW:
        return errno.ENOSPC
    return None


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def error_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
