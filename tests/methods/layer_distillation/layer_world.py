"""A tiny source, two conversions of it and a dataset on disk, and a stage context over them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from source_models import make_source
from text_data import words, write_dataset

from posttrain.methods.layer_distillation import Ild, IldConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Ild()
SMALL = {
    "max_steps": 5,
    "tokens_per_step": 128,
    "sequence_length": 32,
    "micro_batch_size": 2,
    "lr": 1e-2,
    "warmup_ratio": 0.2,
    "save_seconds": 0,
}


def converted(source: torch.nn.Module, kind: str) -> torch.nn.Module:
    """The source with state-space layers, or with latent attention, everywhere."""
    layers = source.config.num_hidden_layers
    if kind == "state":
        from posttrain.methods.hybrid_ssm import hybridize

        return hybridize(source, ["mamba2"] * layers)
    from posttrain.methods.mla_upcycling import upcycle

    return upcycle(source, {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})[0]


def outcome(ctx: StageContext) -> tuple[dict[str, torch.Tensor], list[dict[str, float]], dict[str, object]]:
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
    """Folders `teacher`, its conversions `state` and `latent`, and `data`."""
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    root, tokenizer = tmp_path_factory.mktemp("layers"), tiny_tokenizer()
    source = make_source("llama", seed=1, num_hidden_layers=3)
    save_model(source, tokenizer, root / "teacher")
    for kind in ("state", "latent"):
        save_model(converted(source, kind), tokenizer, root / kind)
    write_dataset(root / "data", words(20))
    return root


@pytest.fixture
def context(world, tmp_path):
    """Make a context: `context(work="a", student="latent", max_steps=3)`."""

    def make(work: str = "work", student: str = "state", teacher: str = "teacher", **changes) -> StageContext:
        folders = {"student": world / student, "teacher": world / teacher, "data": world / "data"}
        work_dir = tmp_path / work
        work_dir.mkdir(exist_ok=True)
        inputs = {
            name: InputArtifact(folder, ArtifactMeta(type=STAGE.inputs[name].type)) for name, folder in folders.items()
        }
        return StageContext("ild", IldConfig(**{**SMALL, **changes}), work_dir, inputs, seed=3)

    return make
