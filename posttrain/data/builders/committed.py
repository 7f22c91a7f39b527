"""posttrain's own held-out text: the same bytes on every machine. `data/heldout/README.md` says what is in it."""

from __future__ import annotations

from pathlib import Path

from posttrain.data.builders.files import read_jsonl
from posttrain.data.documents import Document
from posttrain.errors import RecipeError
from posttrain.paths import shipped

LICENCE = "public domain and Apache-2.0, see data/heldout/README.md"


def committed_file() -> Path:
    """The committed held-out text.

    Raises:
        RecipeError: this installation came without it.
    """
    try:
        path = shipped("data") / "heldout" / "heldout.jsonl"
    except FileNotFoundError:
        path = Path("data/heldout/heldout.jsonl")
    if not path.is_file():
        fix = "data.heldout=split, or data.heldout_path=FILE, or install posttrain from a checkout"
        raise RecipeError("this installation has no committed held-out text", where="data.heldout=committed", fix=fix)
    return path


def build() -> list[Document]:
    """All committed held-out documents."""
    return list(read_jsonl(committed_file(), "heldout", "text", None))
