"""A tiny model, preference pairs and texts on disk, and a stage context over them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from source_models import make_source

from posttrain.methods.preference import Preference, PreferenceConfig
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

STAGE = Preference()
SMALL = {
    "max_steps": 4,
    "pairs_per_step": 4,
    "micro_batch_size": 2,
    "sequence_length": 96,
    "lr": 1e-3,
    "beta": 0.1,
    "warmup_ratio": 0.25,
    "save_seconds": 0,
    "keep": "trained",
}


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def pair(number: int, right: str | None = None, wrong: str | None = None) -> dict:
    """A pair whose two answers have different lengths."""
    return {
        "id": str(number),
        "text": "unused",
        "prompt": turn("user", f"{number} plus {number}?"),
        "chosen": turn("assistant", right or f"It is {2 * number}."),
        "rejected": turn("assistant", wrong or f"No{'o' * (number % 5)}."),
    }


def write_rows(folder: Path, rows: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def latent_source():
    """A model with a full and a latent attention layer, as an upcycling stage makes it."""
    import torch

    from posttrain.models.upcycled.configuration_upcycled import UpcycledConfig
    from posttrain.models.upcycling import build_upcycled

    latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    source = make_source("llama", initializer_range=0.05)
    mixers = ["full_attention", "latent_attention"]
    model = build_upcycled(source, UpcycledConfig.from_source(source.config, mixers=mixers, **latent))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders `model`, `latent`, and `pairs`, `held` (pairs), `texts` of rows."""
    from posttrain.models.loading import save_model
    from posttrain.models.tiny import tiny_tokenizer

    root = tmp_path_factory.mktemp("preference_world")
    save_model(make_source("llama", seed=1, initializer_range=0.05), tiny_tokenizer(), root / "model")
    save_model(latent_source(), tiny_tokenizer(), root / "latent")
    write_rows(root / "pairs", [pair(number) for number in range(14)])
    write_rows(root / "held", [pair(number) for number in range(20, 30)])
    write_rows(root / "texts", [{"id": str(n), "text": f"line {n} of a text. " * (1 + n % 3)} for n in range(5)])
    return root


@pytest.fixture
def context(world, tmp_path):
    """Make a context: `context(work="a", data="pairs", gate_data="held", max_steps=3)`."""

    def make(
        work: str = "work",
        data: str | Path = "pairs",
        model: str = "model",
        gate_data: str | None = None,
        gate_text: str | None = None,
        **changes,
    ) -> StageContext:
        folders = {"model": model, "data": data, "gate_data": gate_data, "gate_text": gate_text}
        work_dir = tmp_path / work
        work_dir.mkdir(exist_ok=True)
        inputs = {
            name: InputArtifact(world / folder, ArtifactMeta(type=STAGE.inputs[name].type))
            for name, folder in folders.items()
            if folder is not None
        }
        return StageContext("preference", PreferenceConfig(**{**SMALL, **changes}), work_dir, inputs, seed=3)

    return make
