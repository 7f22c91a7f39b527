"""A tiny model and datasets of every kind of row on disk, and a stage context over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_models import make_source

from posttrain.methods.sft import Sft, SftConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Sft()
SMALL = {
    "max_steps": 4,
    "tokens_per_step": 512,
    "sequence_length": 128,
    "micro_batch_size": 2,
    "lr": 3e-3,
    "warmup_ratio": 0.25,
    "save_seconds": 0,
}


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sums(count: int) -> list[dict]:
    """Conversations of one or two turns, of different lengths."""
    rows = []
    for number in range(count):
        turns = chat(f"{number} plus {number}?", f"It is {2 * number}.")
        turns += chat("And one more?", f"{2 * number + 1}.") if number % 2 else []
        rows.append({"messages": turns, "text": "unused"})
    return rows


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders `model`, and `chats`, `prompts`, `texts` of rows."""
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    root = tmp_path_factory.mktemp("sft_world")
    save_model(make_source("llama", seed=1, initializer_range=0.05), tiny_tokenizer(), root / "model")
    write_rows(root / "chats", sums(14))
    write_rows(root / "prompts", [{"prompt": f"{n}, ", "completion": f"{n + 1}, {n + 2}"} for n in range(12)])
    write_rows(root / "texts", [{"text": f"line {n} of a text that goes on. " * (1 + n % 7)} for n in range(12)])
    return root


@pytest.fixture
def context(world, tmp_path):
    """Make a context: `context(work="a", data="texts", max_steps=3)`."""

    def make(work: str = "work", data: str | Path = "chats", model: Path | None = None, **changes) -> StageContext:
        folders = {"model": model or world / "model", "data": world / data}
        work_dir = tmp_path / work
        work_dir.mkdir(exist_ok=True)
        inputs = {
            name: InputArtifact(folder, ArtifactMeta(type=STAGE.inputs[name].type)) for name, folder in folders.items()
        }
        return StageContext("sft", SftConfig(**{**SMALL, **changes}), work_dir, inputs, seed=3)

    return make
