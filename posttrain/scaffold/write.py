"""Fill in the templates beside this module and write them as a folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from posttrain.errors import RecipeError

TEMPLATES = Path(__file__).parent
SUFFIX = ".tmpl"


def files(kind: str, words: Mapping[str, str]) -> dict[str, str]:
    """Relative path to content of all files of a kind of folder (`stage`, `user`), with `@word@` replaced.

    `NAME` and `PACKAGE` in a path stand for those words, `dot_` for a leading dot.
    """
    found = {}
    for template in sorted((TEMPLATES / kind).rglob(f"*{SUFFIX}")):
        path = template.relative_to(TEMPLATES / kind).as_posix().removesuffix(SUFFIX)
        for place in ("NAME", "PACKAGE"):
            path = path.replace(place, words.get(place.lower(), place))
        text = template.read_text(encoding="utf-8")
        found[path.replace("dot_", ".", 1)] = re.sub(r"@(\w+)@", lambda word: words[word[1]], text)
    return found


def write_new(folder: Path, content: Mapping[str, str]) -> None:
    """Write those files as a folder that does not exist yet; it is there whole or not at all."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(aside, content)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_into(folder: Path, content: Mapping[str, str]) -> None:
    """Write those files into a folder that may exist and have others.

    Raises:
        RecipeError: one of them is there already; nothing was written.
    """
    if present := [path for path in content if (folder / path).exists()]:
        what = f"{folder} has {', '.join(present)} already, and nothing is overwritten"
        raise RecipeError(what, str(folder), "give another folder, or remove the file")
    _write(folder, content)


def _write(folder: Path, content: Mapping[str, str]) -> None:
    for path, text in content.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
