"""Writes packages as pip would leave them in a folder: modules, data files and metadata with entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from posttrain.config import plugins, registry

STAGE = '''
from posttrain.pipeline.stage import ArtifactMeta, Stage, StageConfig


class Config(StageConfig):
    """{doc}"""

    type: str = "{name}"
    size: int = 3


class {cls}(Stage):
    type = "{name}"
    Config = Config
    outputs = {{"history": "history"}}

    def describe(self, cfg, inputs):
        return {{"history": ArtifactMeta("history")}}

    def run(self, ctx):
        folder = ctx.output_dir("history")
        (folder / "history.jsonl").write_text("{{}}\\n" * ctx.config.size)
        ctx.record_result(size=ctx.config.size)
        return {{"history": folder}}
'''


def stage_module(name: str, cls: str = "Own", doc: str = "Does next to nothing.") -> str:
    return STAGE.format(name=name, cls=cls, doc=doc)


def install(
    folder: Path, name: str, points: Mapping[str, str], files: Mapping[str, str] | None = None, version: str = "1.2"
) -> Path:
    """Put a distribution into `folder`. `points`: "GROUP:NAME" to target; `files`: path to content."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for key, target in points.items():
        group, _, point = key.partition(":")
        lines.append(f"[posttrain.{group}]\n{point} = {target}\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    for path, content in (files or {}).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


def see(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Make this process see what is installed in those folders, for one test."""
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    forget()


def forget() -> None:
    plugins.forget()
    registry.stage.cache_clear()
