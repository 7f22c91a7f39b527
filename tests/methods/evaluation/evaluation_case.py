"""Folders and contexts for evaluation tests: tiny models with the byte tokenizer, a few short documents."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from source_models import make_source

from posttrain.methods.evaluation.config import EvaluateConfig
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import InputArtifact, StageContext
from posttrain.pipeline.stage import ArtifactMeta

WORDS = "alpha beta gamma delta über ελληνικά one two three — four".split()


def save_model(folder: Path, family: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A tiny random model with its tokenizer, as a model artifact."""
    make_source(family, seed=seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    rows = [json.dumps({"id": f"doc-{index}", "text": text}) for index, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return folder


def random_texts(count: int = 5, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(4, 16))) for _ in range(count)]


def config(**changes: Any) -> EvaluateConfig:
    """Small settings without a speed measurement."""
    settings = {"max_tokens": 40, "max_windows": 3, "chunk_tokens": 16, "prompts": [], "repeats": 0}
    return EvaluateConfig(**{**settings, **changes})


def context(work_dir: Path, cfg: EvaluateConfig, **inputs: Path) -> StageContext:
    """A context for the folders given as model, baseline, data."""
    work_dir.mkdir(parents=True, exist_ok=True)
    types = {"data": "dataset"}
    artifacts = {name: InputArtifact(path, ArtifactMeta(types.get(name, "model"))) for name, path in inputs.items()}
    return StageContext("evaluate", cfg, work_dir, artifacts, seed=11)
