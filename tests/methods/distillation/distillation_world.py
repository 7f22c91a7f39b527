"""A tiny student, teacher and dataset on disk, and a stage context over them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from source_models import make_source
from text_data import words, write_dataset

from posttrain.methods.distillation import Distill, DistillConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Distill()
SMALL = {
    "max_steps": 5,
    "tokens_per_step": 128,
    "sequence_length": 32,
    "micro_batch_size": 2,
    "chunk_tokens": 20,
    "lr": 1e-2,
    "warmup_ratio": 0.2,
    "save_seconds": 0,
}


def outcome(ctx: StageContext):
    """Run the stage; weights, history rows and results."""
    folders = STAGE.run(ctx)
    rows = [json.loads(line) for line in (folders["history"] / "history.jsonl").read_text().splitlines()]
    return load_file(folders["model"] / "model.safetensors"), rows, dict(ctx.result)


def assert_same(one, other) -> None:
    """Two outcomes that are equal bit for bit."""
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert one[1:] == other[1:]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders `student`, `teacher` (untied head, other widths, same vocabulary) and `data`."""
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    root = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    save_model(make_source("llama", seed=1), tokenizer, root / "student")
    teacher = make_source("qwen2", seed=2, hidden_size=48, num_hidden_layers=1, tie_word_embeddings=False)
    save_model(teacher, tokenizer, root / "teacher")
    write_dataset(root / "data", words(20))
    return root


@pytest.fixture
def context(world, tmp_path):
    """Make a context: `context(work="a", max_steps=3, teacher=folder)`."""

    def make(work: str = "work", **changes) -> StageContext:
        folders = {name: changes.pop(name, world / name) for name in STAGE.inputs}
        config = DistillConfig(**{**SMALL, **changes})
        work_dir = tmp_path / work
        work_dir.mkdir(exist_ok=True)
        inputs = {
            name: InputArtifact(folder, ArtifactMeta(type=STAGE.inputs[name].type)) for name, folder in folders.items()
        }
        return StageContext("distill", config, work_dir, inputs, seed=3)

    return make


@pytest.fixture(scope="session")
def uneven(tmp_path_factory):
    """Documents of very different length, so that rows and steps hold different numbers of tokens."""
    texts = [text[: 5 + 11 * (i % 4)] for i, text in enumerate(words(23, length=9))]
    return write_dataset(tmp_path_factory.mktemp("uneven") / "data", texts)
