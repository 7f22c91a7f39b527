"""`debug=profile`: a few steps of a training stage are recorded, and nothing else changes."""

from __future__ import annotations

import gzip
import json

import pytest
from training_world import make_trainer

from posttrain.training.callbacks import ProfileCallback


@pytest.mark.parametrize(("steps", "max_steps", "recorded"), [(2, 6, 2), (3, 4, 2), (3, 2, 2)])
def test_steps_are_recorded_from_the_third_on(tmp_path, steps, max_steps, recorded):
    plain = make_trainer(tmp_path / "plain", max_steps=max_steps).fit()
    trainer = make_trainer(tmp_path / "profiled", max_steps=max_steps)
    trainer.add_callback(ProfileCallback(tmp_path / "profile", steps))
    assert trainer.fit() == plain
    with gzip.open(tmp_path / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == recorded
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()
