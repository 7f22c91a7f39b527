"""Writes that survive a crash: aside, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that names created or renamed in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """fsync a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: readers see the old content or the new, also after a crash."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises FileNotFoundError or ValueError (`json.JSONDecodeError`)."""
    return json.loads(path.read_text(encoding="utf-8"))


def remove_tree(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    # shutil loads the compression libraries, which a plan should not wait for.
    from shutil import rmtree

    rmtree(folder)


def discard_tree(folder: Path) -> None:
    """Remove a folder in which others may be about to make names: it is gone at once, whole."""
    gone = folder.with_name(f".gone-{folder.name.lstrip('.')}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    # What cannot be removed now (somebody else removes it, or a network file system keeps what is open) `clean` finds.
    from shutil import rmtree

    rmtree(gone, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove everything in a folder, such as what an interrupted attempt left in an output."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            remove_tree(path)
        else:
            path.unlink()


def list_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its relative POSIX path, sorted. Links to folders are not followed."""
    found = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            path = Path(parent, name)
            found[path.relative_to(folder).as_posix()] = path
    return dict(sorted(found.items()))
