"""What decides the result of a stage, as a document, and its digest: the key of the artifact.

The key exists at plan time. It holds the stage's type and code version (and its package, if that is not posttrain), its
settings, the seed if the stage draws from it, what lies outside the recipe (a folder's digest, a revision) and the keys
of its inputs; it does not hold names, paths, host or engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import registry
from posttrain.errors import RecipeError
from posttrain.paths import user_cache
from posttrain.pipeline.files import read_json, write_text

if TYPE_CHECKING:
    from posttrain.pipeline.stage import Stage, StageConfig

KEY_LENGTH = 32
_RACY_SECONDS = 2.0


def canonical_json(data: Any) -> bytes:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8. Raises ValueError for NaN or infinity."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8")


def digest(data: Any) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(data)).hexdigest()


def key_document(stage: Stage, cfg: StageConfig, seed: int, inputs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Everything that decides what the stage computes. `inputs` maps input name to (key, output) of its producer."""
    document = {
        "type": stage.type,
        "version": stage.version,
        "config": {name: value for name, value in cfg.key_fields().items() if name != "type"},
        "external": stage.external(cfg),
        "inputs": {name: {"key": key, "output": output} for name, (key, output) in inputs.items()},
    }
    if stage.uses_seed(cfg):
        document["seed"] = seed
    if (plugin := registry.package_of(stage.type)) is not None:
        # Two packages may call different things by one name, one today and the other tomorrow.
        document["package"] = plugin.package
    return json.loads(canonical_json(document))


def key_of(document: Mapping[str, Any]) -> str:
    """The key: the first 32 hexadecimal digits of the document's SHA-256."""
    return digest(document)[:KEY_LENGTH]


def changed_external(stage: Stage, cfg: StageConfig, document: Mapping[str, Any]) -> list[str]:
    """What lies outside the recipe and is no longer as in a key document, one line each; empty when all is the same.

    Raises:
        RecipeError: something of it cannot be read any more.
    """
    return _differences(document["external"], json.loads(canonical_json(stage.external(cfg))))


def explain(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], parents: Mapping[str, str] | None = None
) -> list[str]:
    """Why two key documents differ, for a reader: `lr 1e-05 → 2e-05`, `parent upcycle changed`, `new`.

    Args:
        old: the earlier document, None when there is none.
        parents: input name to the name of the stage that produces it now.
    """
    if old is None:
        return ["new"]
    reasons = []
    if old.get("type") != new["type"]:
        return [f"stage type {old.get('type')} → {new['type']}"]
    if old.get("package") != new.get("package"):
        return [f"stage type {new['type']} of {old.get('package', 'posttrain')} → of {new.get('package', 'posttrain')}"]
    if old.get("version") != new["version"]:
        reasons.append(f"stage code version {old.get('version')} → {new['version']}")
    reasons += _differences(old.get("config", {}), new["config"])
    before, now = ({"seed": document["seed"]} if "seed" in document else {} for document in (old, new))
    reasons += _differences(before, now)
    reasons += [f"outside the recipe: {text}" for text in _differences(old.get("external", {}), new["external"])]
    return reasons + _input_reasons(old.get("inputs", {}), new["inputs"], parents or {})


def _input_reasons(old: Mapping[str, Any], new: Mapping[str, Any], parents: Mapping[str, str]) -> list[str]:
    reasons = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            reasons.append(f"input {name} added")
        elif name not in new:
            reasons.append(f"input {name} removed")
        elif old[name]["output"] != new[name]["output"]:
            reasons.append(f"input {name} now takes output {new[name]['output']}")
        elif old[name]["key"] != new[name]["key"]:
            reasons.append(f"parent {parents.get(name, name)} changed")
    return list(dict.fromkeys(reasons))


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for name in sorted(old.keys() | new.keys()):
            path = f"{prefix}.{name}" if prefix else str(name)
            if name not in old:
                lines.append(f"{path} added ({_short(new[name])})")
            elif name not in new:
                lines.append(f"{path} removed (was {_short(old[name])})")
            else:
                lines += _differences(old[name], new[name], path)
        return lines
    return [] if old == new and type(old) is type(new) else [f"{prefix} {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = isinstance(value, str) and len(text) == 64 and not text.strip("0123456789abcdef")
    if is_hash:
        return text[:12]
    return text if len(text) <= 48 else f"{text[:45]}…"


def digest_path(path: Path | str) -> str:
    """SHA-256 of a file's content, or of a folder's (relative names, sizes and contents; hidden entries left out).

    Cached in the user's cache folder by path, size and modification time, so that large files are read once.

    Raises:
        RecipeError: the path does not exist or cannot be read.
    """
    root = Path(path).expanduser().resolve()
    if not root.exists():
        raise RecipeError(f"{path} does not exist", fix="give the path of an existing file or folder")
    fresh = _cached_digests(root, _content(root), hash_file)
    if root.is_file():
        return fresh[""]["sha256"]
    return digest([[name, entry["size"], entry["sha256"]] for name, entry in fresh.items()])


def digest_files(root: Path, files: Mapping[str, Path], purpose: str) -> str:
    """SHA-256 of some files, by name and content, cached as in `digest_path`; `purpose` tells this choice from others.

    Raises:
        RecipeError: a file cannot be read.
    """
    fresh = _cached_digests(root, dict(sorted(files.items())), hash_file, purpose)
    return digest([[name, entry["size"], entry["sha256"]] for name, entry in fresh.items()])


def digest_by(file: Path, compute: Callable[[Path], str], name: str) -> str:
    """`compute(file)`, cached as in `digest_path`; `name` sets it apart and changes when `compute` does.

    Raises:
        RecipeError: the file cannot be read.
    """
    root = file.resolve()
    return _cached_digests(root, {"": root}, compute, name)[""]["sha256"]


def _cached_digests(
    root: Path, files: Mapping[str, Path], compute: Callable[[Path], str], purpose: str = ""
) -> dict[str, dict[str, Any]]:
    """Size, times and digest of every file below `root`, computed only for files that changed since the last time."""
    identity = os.fsencode(root) + (f"\0{purpose}".encode() if purpose else b"")
    cache_file = user_cache() / "digests" / f"{hashlib.sha256(identity).hexdigest()[:32]}.json"
    known = _read_cache(cache_file)
    try:
        fresh = {name: _digest_file(file, known.get(name), compute) for name, file in files.items()}
    except OSError as error:
        raise RecipeError(f"{error.filename or root} cannot be read: {error.strerror}") from error
    settled = {name: entry for name, entry in fresh.items() if time.time() - entry["mtime_ns"] / 1e9 > _RACY_SECONDS}
    if settled != known:
        _write_cache(cache_file, root, settled)
    return fresh


def _content(root: Path) -> dict[str, Path]:
    if root.is_file():
        return {"": root}
    found = {}
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(parent, name)
                found[file.relative_to(root).as_posix()] = file
    if not found:
        raise RecipeError(f"{root} is an empty folder", fix="give a folder that holds files")
    return dict(sorted(found.items()))


def _digest_file(file: Path, known: Mapping[str, Any] | None, compute: Callable[[Path], str]) -> dict[str, Any]:
    stat = file.stat()
    # The change time catches a file put in place with the size and modification time of another.
    identity = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    if known is not None and all(known.get(name) == value for name, value in identity.items()):
        return dict(known)
    return {**identity, "sha256": compute(file)}


def hash_file(file: Path) -> str:
    """SHA-256 of one file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_cache(cache_file: Path) -> dict[str, Any]:
    try:
        files = read_json(cache_file)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _write_cache(cache_file: Path, root: Path, files: Mapping[str, Any]) -> None:
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache_file, json.dumps({"path": str(root), "files": files}))
    except OSError:
        # The cache only saves time; a read-only home is no reason to fail.
        return
