"""A tiny source, its two conversions and a dataset on disk, and stage contexts over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from source_models import make_source
from text_data import words, write_dataset

from posttrain.config import registry
from posttrain.models.architecture import normalise
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

LAYERS = 6


def sources(layers: int = LAYERS, family: str = "llama") -> dict[str, torch.nn.Module]:
    """A source `teacher`, and of it `state` and `latent` with every layer changed as alignment would change it."""
    from posttrain.methods.hybrid_ssm import hybridize
    from posttrain.methods.mla_upcycling import upcycle

    source = make_source(family, seed=1, num_hidden_layers=layers, initializer_range=0.1)
    latent = upcycle(source, {"kv_lora_rank": 12, "qk_rope_head_dim": 8, "rotary_plan": "xeco"})[0]
    models = {"teacher": source, "state": hybridize(source, ["mamba2"] * layers), "latent": latent}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name in ("state", "latent"):
            for parameter in (*models[name].model.layers.parameters(), *models[name].model.norm.parameters()):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return models


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    root, tokenizer = tmp_path_factory.mktemp("hybrid"), tiny_tokenizer()
    for name, model in sources().items():
        save_model(model, tokenizer, root / name)
    write_dataset(root / "data", words(12))
    return root


@pytest.fixture
def context(world, tmp_path):
    """Make a context: `context("assemble", {"state": "state", …}, keep=[0])`."""

    def make(
        stage: str, inputs: dict[str, str | Path], work: str = "work", seed: int = 3, **settings: Any
    ) -> StageContext:
        specs = registry.stage(stage).inputs
        found = {
            name: InputArtifact(world / folder, ArtifactMeta(type=specs[name].type)) for name, folder in inputs.items()
        }
        work_dir = tmp_path / work
        work_dir.mkdir(exist_ok=True)
        return StageContext(stage, registry.stage(stage).Config(**settings), work_dir, found, seed=seed)

    return make


def metas(models: dict[str, torch.nn.Module], **roles: str) -> dict[str, ArtifactMeta]:
    """What a plan knows: `metas(models, state="state", attention="latent")`."""
    found = {}
    for role, name in roles.items():
        if name == "data":
            found[role] = ArtifactMeta("dataset", rows=3, tokens=1000)
        else:
            found[role] = ArtifactMeta("model", normalise(models[name].config.to_dict()), tokenizer="same")
    return found
