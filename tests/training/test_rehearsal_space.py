"""Checkpoints of an earlier attempt are room that the next one has."""

from __future__ import annotations

import pytest
import torch
from source_models import make_source

from posttrain.errors import StageError
from posttrain.training import rehearsal


def test_kept_checkpoints_count_as_room(tmp_path, monkeypatch):
    model = make_source("llama")
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StageError, match="too little space"):
        rehearsal.rehearse_save(tmp_path, model, model.config, torch.float32, needed=1500)
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors").write_bytes(bytes(600))
    rehearsal.rehearse_save(tmp_path, model, model.config, torch.float32, needed=1500)
