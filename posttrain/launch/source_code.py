"""Which code an artifact was made by: a commit and what differed from it, or an installed version and its digest."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from posttrain import __version__
from posttrain.pipeline.fingerprint import digest_files, hash_file

PACKAGES = ("posttrain", "posttrain_kernels")
SOURCE_SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".jinja", ".j2", ".sh", ".cu", ".cuh", ".cpp", ".h")
DIFF_LIMIT = 256 * 1024
"""Bytes up to which a diff is kept beside the manifest; of a longer one only the digest is known."""
MOST_FILES, LARGEST_FILE = 200, 1 << 20
# Whatever the user's own configuration of git says, the same changes give the same text, which `git apply` reads.
_PLAIN = ("-c", "core.quotepath=off", "-c", "diff.noprefix=false", "-c", "diff.mnemonicPrefix=false")
_DIFF = ("diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--no-textconv")


@dataclass(frozen=True)
class SourceCode:
    """`entry`: the manifest's `git`. `diff`: what `git diff HEAD` says, None when it is empty or above the limit."""

    entry: dict[str, Any]
    diff: bytes | None = None


def source_code(root: Path | None = None) -> SourceCode:
    """What runs in this process, by default; a folder that is no checkout is told by its version and its files.

    `entry` of a checkout: `commit`, `changed`; when changed, `diff` (`sha256`, `size`, `kept`) and `untracked` (source
    files with their digests). Elsewhere: `commit` None, `why`, `version`, `files` and `sha256` of the installed source.
    """
    root = Path(__file__).resolve().parents[2] if root is None else root
    if not (root / ".git").exists():
        return SourceCode(_installed("not run from a git checkout"))
    try:
        commit = _git(root, "rev-parse", "HEAD").decode().strip()
        diff = _git(root, *_DIFF)
        others = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    except FileNotFoundError:
        return SourceCode(_installed("a git checkout, but there is no git program"))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode("utf-8", "replace").strip() or str(error)
        return SourceCode(_installed(f"a git checkout that git does not read: {said.splitlines()[0][:200]}"))
    untracked = _untracked(root, others)
    entry: dict[str, Any] = {"commit": commit, "changed": bool(diff or untracked)}
    kept = bool(diff) and len(diff) <= DIFF_LIMIT
    if diff:
        entry["diff"] = {"sha256": hashlib.sha256(diff).hexdigest(), "size": len(diff), "kept": kept}
    if untracked:
        entry["untracked"] = untracked
    return SourceCode(entry, diff if kept else None)


def _git(root: Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(root), *_PLAIN, *arguments]
    # A hook of git's has these set to the repository that it is of.
    hidden = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(command, capture_output=True, timeout=20, check=True, env=environment).stdout


def _untracked(root: Path, listed: bytes) -> list[dict[str, Any]]:
    """Source files that git does not know; data and models that lie about in the checkout are not code."""
    found = []
    for name in sorted(filter(None, listed.decode("utf-8", "replace").split("\0"))):
        path = root / name
        if path.suffix in SOURCE_SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST_FILE:
            found.append({"path": name, "sha256": hash_file(path), "size": path.stat().st_size})
    if len(found) > MOST_FILES:
        left = len(found) - MOST_FILES
        return [*found[:MOST_FILES], {"path": f"and {left} more", "sha256": None, "size": None}]
    return found


def _installed(why: str) -> dict[str, Any]:
    """Version and digest of the packages' source files; read anew only where one has changed."""
    files: dict[str, Path] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for path in Path(folder).rglob("*"):
                if path.suffix in SOURCE_SUFFIXES and "__pycache__" not in path.parts:
                    files[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    sha256 = digest_files(Path(__file__).resolve().parents[1], files, "source")
    return {"commit": None, "why": why, "version": __version__, "files": len(files), "sha256": sha256}
