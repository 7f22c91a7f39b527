"""Build data/heldout/heldout.jsonl: our own texts, and excerpts of public-domain books out of Debian packages.

    apt-get download r-cran-janeaustenr golang-1.19-src miscfiles
    for package in *.deb; do dpkg-deb -x "$package" unpacked; done
    python scripts/build_heldout.py unpacked

The result is committed; running this again must not change it (`--check`).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

HELDOUT = Path(__file__).resolve().parent.parent / "data" / "heldout"
AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
OPTICKS = "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt"
CONSTITUTION = "usr/share/state/us-constitution.gz"
BOOKS = ("emma", "mansfield_park", "northanger_abbey", "persuasion", "pride_and_prejudice", "sense_and_sensibility")
EXCERPT_WORDS = 450
R_STRINGS, R_NA = 16, -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path, help="folder into which the Debian packages were unpacked")
    parser.add_argument("--check", action="store_true", help="compare with the committed file, write nothing")
    arguments = parser.parse_args()
    rows = [*own_texts(), *austen(arguments.unpacked / AUSTEN), *opticks(arguments.unpacked / OPTICKS)]
    rows += constitution(arguments.unpacked / CONSTITUTION)
    # Mixed, so that an evaluation of the first few documents meets every kind.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    target = HELDOUT / "heldout.jsonl"
    digest = hashlib.sha256(content).hexdigest()
    print(f"{len(rows)} documents, {len(content)} bytes, sha256 {digest}")
    if arguments.check:
        return int(target.read_bytes() != content)
    target.write_bytes(content)
    return 0


def own_texts() -> Iterator[dict]:
    """Texts written for this project; `chat_*` are conversations."""
    for path in sorted((HELDOUT / "own").glob("*.md")):
        text = path.read_text(encoding="utf-8").strip()
        row = {"id": f"own/{path.stem}", "text": text}
        if path.stem.startswith("chat_"):
            turns = re.split(r"(?:^|\n\n)(User|Assistant): ", text)[1:]
            pairs = zip(turns[::2], turns[1::2], strict=True)
            row["messages"] = [{"role": role.lower(), "content": content.strip()} for role, content in pairs]
        yield row


def austen(database: Path) -> Iterator[dict]:
    """One excerpt from the middle of each novel."""
    for name, lines in zip(BOOKS, r_string_vectors(database.read_bytes()), strict=True):
        paragraphs = as_paragraphs("\n".join(lines))
        yield excerpt(f"austen/{name}", paragraphs, len(paragraphs) // 2)


def opticks(path: Path) -> Iterator[dict]:
    """Six excerpts of Newton's Opticks, evenly spread, without figures and tables."""
    text = path.read_text(encoding="utf-8").replace("_", "")
    paragraphs = [part for part in as_paragraphs(text) if "Illustration" not in part and len(part) > 200]
    for number in range(6):
        yield excerpt(f"opticks/{number + 1}", paragraphs, len(paragraphs) * (2 * number + 1) // 12)


def constitution(path: Path) -> Iterator[dict]:
    """Articles I and II of the constitution of the United States."""
    text = gzip.decompress(path.read_bytes()).decode("latin-1")
    articles = re.split(r"\n(?=Article [IV]+\n)", text)
    for article in (part for part in articles if re.match(r"Article (I|II)\n", part)):
        paragraphs = as_paragraphs(article)
        yield excerpt(f"constitution/article_{paragraphs[0].split()[1].lower()}", paragraphs, 0)


def excerpt(name: str, paragraphs: list[str], start: int) -> dict:
    """Whole paragraphs from `start` until there are `EXCERPT_WORDS` words."""
    taken: list[str] = []
    for paragraph in paragraphs[start:]:
        taken.append(paragraph)
        if sum(len(part.split()) for part in taken) >= EXCERPT_WORDS:
            break
    return {"id": name, "text": "\n\n".join(taken)}


def as_paragraphs(text: str) -> list[str]:
    """Paragraphs with their line breaks removed; headings of chapters and volumes are left out."""
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if part and not re.match(r"(chapter|volume)\s+[\divxlc]+\.?$", part, re.IGNORECASE)]


def r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R data base of lazily loaded objects: zlib pieces, each behind its length."""
    position = 0
    while position < len(database):
        unzip = zlib.decompressobj()
        data = unzip.decompress(database[position + 4 :])
        position = len(database) - len(unzip.unused_data)
        yield _strings(data)


def _strings(data: bytes) -> list[str]:
    """The first character vector of an R object serialised in big-endian order."""
    position = data.index(struct.pack(">I", R_STRINGS), 14) + 4
    (count,) = struct.unpack_from(">I", data, position)
    position += 4
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">Ii", data, position)
        position += 8
        strings.append("" if length == R_NA else data[position : position + length].decode("utf-8"))
        position += max(length, 0)
    return strings


if __name__ == "__main__":
    sys.exit(main())
