"""Small datasets of words on disk, as artifacts of a data stage."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path


def write_dataset(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    digest = hashlib.sha256(rows.encode()).hexdigest()
    card = {"name": "words", "split": "train", "rows": len(texts), "bytes": len(rows.encode()), "sha256": digest}
    (folder / "dataset.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def words(documents: int, length: int = 12, seed: int = 0) -> list[str]:
    pick = random.Random(seed)
    names = ["alpha", "beta", "gamma", "delta", "omega"]
    return [" ".join(pick.choice(names) for _ in range(length)) for _ in range(documents)]
