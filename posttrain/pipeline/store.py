"""The artifact store: one immutable folder a key, whose manifest is written last. No manifest, no artifact.

`<root>/<stage type>/<key>/` holds a folder per output, `manifest.json` and, where the code was changed, `code.diff`.
Work goes on in `.work-<key>` beside it; finalising seals `.work-<key>/outputs` (hash, fsync, manifest) and renames it
into place, so that a crash at any moment leaves either a work folder that can be resumed or a complete artifact.
`.old-<key>` is an artifact that a forced rerun has set aside; `.stale-<key>` is one whose inputs were replaced by such
a rerun; `.damaged-<key>` is one whose files are not what they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import PosttrainError, RecipeError, StageError
from posttrain.pipeline.files import list_files, read_json, remove_tree, sync_file, sync_folder, write_json
from posttrain.pipeline.fingerprint import digest, hash_file
from posttrain.pipeline.stage import ArtifactMeta

FORMAT = 1
MANIFEST = "manifest.json"
CODE_DIFF = "code.diff"
"""Beside a manifest: how the code that made the artifact differed from the commit the manifest names."""
REQUIRED_FILES = {
    "model": ("config.json",),
    "dataset": ("rows.jsonl", "dataset.json"),
    "history": ("history.jsonl",),
    "conversion": ("conversion.json",),
    "selection": ("selection.json",),
    "evaluation": ("metrics.json",),
}


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def key(self) -> str:
        return self.manifest["key"]

    @property
    def metas(self) -> dict[str, ArtifactMeta]:
        """What was measured of every output."""
        return {name: ArtifactMeta.from_json(output["meta"]) for name, output in self.manifest["outputs"].items()}

    def output(self, name: str) -> Path:
        """Folder of one output."""
        return self.folder / name


class Store:
    """The folder `outputs/store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, type_: str, key: str) -> Path:
        return self.root / type_ / key

    def work_dir(self, type_: str, key: str) -> Path:
        return self.root / type_ / f".work-{key}"

    def aside(self, type_: str, key: str) -> Path:
        return self.root / type_ / f".old-{key}"

    def find(self, type_: str, key: str) -> Artifact | None:
        """The artifact of that key, None when there is none.

        Raises:
            RecipeError: its manifest was changed or cannot be read.
        """
        folder = self.folder(type_, key)
        return read_artifact(folder) if (folder / MANIFEST).exists() else None

    def artifacts(self) -> Iterator[Path]:
        """Folders of all artifacts, without opening them."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if not manifest.parent.name.startswith("."):
                yield manifest.parent

    def work_dirs(self) -> list[Path]:
        """All work folders, abandoned or not."""
        return sorted(self.root.glob("*/.work-*"))

    def set_aside(self, type_: str, key: str) -> None:
        """Move an artifact out of the way of a forced rerun; the new one's publication removes it."""
        old = self.aside(type_, key)
        if old.exists():
            remove_tree(old)
        os.rename(self.folder(type_, key), old)
        sync_folder(old.parent)

    def stale(self, type_: str, key: str) -> Path:
        return self.root / type_ / f".stale-{key}"

    def retire(self, type_: str, key: str) -> bool:
        """Take away an artifact made from inputs that a rerun replaced; true when there was one. `clean` removes it."""
        folder, stale = self.folder(type_, key), self.stale(type_, key)
        if not folder.exists():
            return False
        if stale.exists():
            remove_tree(stale)
        os.rename(folder, stale)
        sync_folder(stale.parent)
        return True

    def damaged(self, type_: str, key: str) -> Path:
        return self.root / type_ / f".damaged-{key}"

    def set_damaged(self, type_: str, key: str) -> bool:
        """Move a damaged artifact out of the way of the one that is made anew; true when there was one."""
        folder, damaged = self.folder(type_, key), self.damaged(type_, key)
        if not folder.exists():
            return False
        if damaged.exists():
            remove_tree(damaged)
        os.rename(folder, damaged)
        sync_folder(damaged.parent)
        return True

    def restore(self, type_: str, key: str) -> bool:
        """Undo `set_aside` when no new artifact came; true when something was restored."""
        old, folder = self.aside(type_, key), self.folder(type_, key)
        if not old.exists() or folder.exists():
            return False
        os.rename(old, folder)
        sync_folder(folder.parent)
        return True


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's canonical JSON without the field that holds it."""
    return digest({name: value for name, value in manifest.items() if name != "sha256"})


def read_artifact(folder: Path) -> Artifact:
    """Open a complete artifact, checking its manifest against itself (not its files: see `verify`).

    Raises:
        RecipeError: the manifest is unreadable, of another format, or was changed after it was written.
    """
    path = folder / MANIFEST
    fix = f"remove the artifact and let it be made again: rm -r {folder}"
    try:
        manifest = read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the manifest of an artifact cannot be read: {error}", str(path), fix) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise RecipeError(f"the manifest is not of format {FORMAT}, which this posttrain reads", str(path), fix)
    if manifest.get("sha256") != _digest_or_none(manifest):
        what = "the manifest was changed after it was written: its SHA-256 does not match"
        raise RecipeError(what, str(path), f"put it back, or {fix}")
    if manifest["key"] != folder.name and folder.name not in ("outputs", f".old-{manifest['key']}"):
        raise RecipeError(f"the artifact's folder was renamed: its key is {manifest['key']}", str(folder), fix)
    return Artifact(folder, manifest)


def _digest_or_none(manifest: Mapping[str, Any]) -> str | None:
    try:
        return manifest_digest(manifest)
    except ValueError:
        return None


def seal(work_dir: Path, manifest: Mapping[str, Any], code_diff: bytes | None = None) -> None:
    """Turn `work_dir/outputs` into an artifact in all but its place.

    `manifest["outputs"]` holds type and meta of every declared output; the files' digests are added here. `code_diff`
    is kept beside the manifest, whose `beside` has its digest.

    Raises:
        StageError: an output is missing, empty, undeclared, holds links, or lacks a file its type requires.
    """
    outputs = work_dir / "outputs"
    for name in (MANIFEST, CODE_DIFF):
        (outputs / name).unlink(missing_ok=True)
    declared = manifest["outputs"]
    _check_declared(outputs, declared)
    files = {name: _hash_output(outputs / name, name, declared[name]["type"]) for name in declared}
    complete = {
        **manifest,
        "outputs": {name: {**declared[name], "files": files[name]} for name in declared},
    }
    if code_diff is not None:
        (outputs / CODE_DIFF).write_bytes(code_diff)
        complete["beside"] = {CODE_DIFF: {"sha256": hash_file(outputs / CODE_DIFF), "size": len(code_diff)}}
    _sync_tree(outputs)
    write_json(outputs / MANIFEST, {**complete, "sha256": manifest_digest(complete)})


def sealed(work_dir: Path) -> bool:
    """Whether a crash came between `seal` and `publish`: nothing is left to do but to publish."""
    try:
        read_artifact(work_dir / "outputs")
    except PosttrainError:
        return False
    return True


def publish(work_dir: Path, target: Path) -> Artifact:
    """Rename sealed outputs into place and drop the stage's checkpoints; the work folder itself stays for its owner."""
    if target.exists() and not (target / MANIFEST).exists():
        remove_tree(target)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(work_dir / "outputs", target)
        sync_folder(target.parent)
    old = target.with_name(f".old-{target.name}")
    if old.exists():
        remove_tree(old)
    checkpoints = work_dir / "checkpoints"
    if checkpoints.exists():
        remove_tree(checkpoints)
    return read_artifact(target)


def _check_declared(outputs: Path, declared: Mapping[str, Any]) -> None:
    for entry in sorted(outputs.iterdir()) if outputs.exists() else []:
        if entry.name.startswith(".") and entry.is_file():
            entry.unlink()
        elif entry.name not in declared:
            raise StageError(f"the stage wrote an output '{entry.name}' that it does not declare", str(entry))
    for name, output in declared.items():
        if not (outputs / name).is_dir() or not any((outputs / name).iterdir()):
            what = f"the stage ended without writing its output '{name}' (a {output['type']})"
            raise StageError(what, str(outputs / name))


def _hash_output(folder: Path, name: str, type_: str) -> dict[str, dict[str, Any]]:
    files = list_files(folder)
    for relative in REQUIRED_FILES.get(type_, ()):
        if relative not in files:
            raise StageError(f"output '{name}' is no {type_}: it has no {relative}", str(folder))
    for path in [*files.values(), *(p for p in folder.rglob("*") if p.is_dir())]:
        if path.is_symlink():
            raise StageError(f"output '{name}' holds a link, which an artifact may not", str(path))
    digests = hash_files(list(files.values()))
    return {
        relative: {"sha256": found, "size": path.stat().st_size}
        for (relative, path), found in zip(files.items(), digests, strict=True)
    }


def _sync_tree(folder: Path) -> None:
    for path in list_files(folder).values():
        sync_file(path)
    for parent in [*(p for p in folder.rglob("*") if p.is_dir()), folder, folder.parent]:
        sync_folder(parent)


def hash_files(files: list[Path]) -> list[str]:
    """SHA-256 of every file, several at a time."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(hash_file, files))


def verify(folder: Path) -> list[str]:
    """Re-hash an artifact's files; one line for every one that is changed, missing or extra, none when all is well."""
    lines = damage(folder)
    try:
        artifact = read_artifact(folder)
    except RecipeError:
        return lines
    beside = artifact.manifest.get("beside", {})
    known = {MANIFEST, *_expected(artifact), *beside}
    extra = [f"extra: {name}" for name in list_files(folder) if name not in known]
    return [*lines, *_wrong(folder, beside, content=True), *extra]


def damage(folder: Path, output: str | None = None, *, content: bool = True) -> list[str]:
    """What is changed or missing of an artifact's outputs, or of one of them; none when all is well.

    What only lies beside the manifest is no output: a model is not made again for want of its `code.diff`.

    Args:
        content: hash the files; else only look at their sizes, which costs nothing and finds those cut short.
    """
    try:
        artifact = read_artifact(folder)
    except RecipeError as error:
        return [error.problems[0].what]
    expected = {name: fact for name, fact in _expected(artifact).items() if output in (None, name.partition("/")[0])}
    return _wrong(folder, expected, content=content)


def _wrong(folder: Path, expected: Mapping[str, Mapping[str, Any]], *, content: bool) -> list[str]:
    wrong, to_hash = {}, []
    for name, fact in expected.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            wrong[name] = "missing"
            continue
        if size != fact["size"]:
            wrong[name] = "changed"
        else:
            to_hash.append(name)
    if content:
        for name, found in zip(to_hash, hash_files([folder / name for name in to_hash]), strict=True):
            if found != expected[name]["sha256"]:
                wrong[name] = "changed"
    return [f"{wrong[name]}: {name}" for name in expected if name in wrong]


def _expected(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Digest and size of every file by its path in the artifact."""
    return {
        f"{name}/{relative}": fact
        for name, output in artifact.manifest["outputs"].items()
        for relative, fact in output["files"].items()
    }


def link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, replacing an earlier link at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    relative = os.path.relpath(target, path.parent)
    if path.is_symlink() and os.readlink(path) == relative:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    aside.unlink(missing_ok=True)
    os.symlink(relative, aside)
    os.replace(aside, path)
