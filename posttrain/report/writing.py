"""Puts a report together and writes it, unless the one on disk was made from the same inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.pipeline.files import write_text
from posttrain.report import cards, html, markdown
from posttrain.report.blocks import Block, Figure
from posttrain.report.read import read_run

HEAD_BYTES = 512


def build_report(run_dir: Path) -> Path:
    """See `posttrain.report.build`."""
    page, text = run_dir / "report.html", run_dir / "report.md"
    run = read_run(run_dir)
    digest = run.digest()
    if text.is_file() and page.is_file() and cards.complete(run) and _digest_on_disk(page) == digest:
        return page
    from posttrain.report.content import content, title

    blocks = content(run)
    cards.write(run)
    return _write(run_dir, title(run), blocks, digest)


def build_comparison(folder: Path, runs: list[Path], record: dict[str, Any] | None) -> Path:
    """See `posttrain.report.compare`."""
    from posttrain.report import comparison

    entries = comparison.entries_of(runs, record)
    digest = comparison.digest_of(entries, record)
    page = folder / "report.html"
    if page.is_file() and _digest_on_disk(page) == digest:
        return page
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{record['recipe']}: sweep {record['name']}" if record else f"{len(runs)} runs compared"
    return _write(folder, title, comparison.blocks(title, entries, record), digest)


def _write(target: Path, title: str, blocks: list[Block], digest: str) -> Path:
    """`report.md`, `report_files/` and `report.html` in a folder; the path of the last."""
    folder = target / markdown.FILES
    folder.mkdir(exist_ok=True)
    figures = {f"{name}.png": png for block in blocks if isinstance(block, Figure) for name, png in block.panels}
    for stale in folder.glob("*.png"):
        if stale.name not in figures:
            stale.unlink()
    for name, png in figures.items():
        _write_bytes(folder / name, png)
    write_text(target / "report.md", markdown.render(blocks))
    # Last, since its digest says that everything else is in place.
    page = target / "report.html"
    write_text(page, html.render(title, blocks, digest))
    return page


def _digest_on_disk(page: Path) -> str | None:
    with page.open(encoding="utf-8") as file:
        return html.read_digest(file.read(HEAD_BYTES))


def _write_bytes(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.aside")
    aside.write_bytes(data)
    os.replace(aside, path)
