"""Tiny converted models on disk and their exports."""

from __future__ import annotations

from pathlib import Path

from source_models import make_source

from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.write import Given, export_model
from posttrain.methods.mla_upcycling import upcycle
from posttrain.models.loading import save_model
from posttrain.models.tiny import tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def convert(family: str = "llama", settings: dict | None = None, calibration=None, **changes):
    """A source and its conversion, r 16 + d_r 8 of 64 elements, evenly spread pairs."""
    source = make_source(family, **changes)
    given = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "rotary_pairs": "uniform", **(settings or {})}
    return source, upcycle(source, given, calibration)[0]


def save(folder: Path, family: str = "llama", *, dtype=None, settings: dict | None = None, **changes) -> Path:
    """A conversion with its tokenizer in FOLDER/native."""
    return save_model(convert(family, settings, **changes)[1], tiny_tokenizer(), folder / "native", dtype=dtype)


def export(source: Path, given: Given | None = None, **settings) -> dict:
    """Export beside `source`; the certificate."""
    target = source.parent / "export"
    target.mkdir()
    return export_model(source, target, ExportConfig(**{"to": "deepseek_v3", **settings}), given)
