"""`x_ecomla` and `transmla` at `scale=smoke`: whole runs, and training that is killed and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import (
    RUN,
    artifact,
    copy_store_without,
    deterministic_part,
    kill,
    posttrain,
    start_and_pause,
    step_of,
    thaw,
)

TRANSMLA = ["run", "transmla", "scale=smoke"]


@pytest.fixture(scope="module")
def transmla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transmla")
    posttrain(*TRANSMLA, cwd=folder)
    return folder / "outputs"


def result(outputs: Path, stage: str) -> dict:
    return json.loads((artifact(outputs, stage) / "manifest.json").read_text())["metrics"]["result"]


def config(outputs: Path, stage: str) -> dict:
    return json.loads((artifact(outputs, stage) / "model" / "config.json").read_text())


def killed_and_resumed(run: list[str], base: Path, folder: Path, stage: str, type_: str) -> Path:
    """The outputs of a run whose worker was killed after its first checkpoint, and that was then resumed."""
    outputs = folder / "outputs"
    copy_store_without(base, outputs, type_)
    runner, pid = start_and_pause(*run, cwd=folder, event=step_of(stage, 3))
    assert any(outputs.glob(f"store/{type_}/.work-*/checkpoints/checkpoint-2/COMPLETE"))
    kill(pid)
    thaw(pid)
    assert runner.wait(timeout=60) != 0
    posttrain("resume", cwd=folder)
    return outputs


def test_x_ecomla_keeps_a_model_by_its_gate(undisturbed: Path) -> None:
    found = result(undisturbed, "prefer")
    assert found["kept"] in ("trained", "input") and found["steps"] == 4
    pairs = result(undisturbed, "datasets.pairs")
    assert pairs["train_rows"] > 0 and pairs["heldout_rows"] > 0
    distilled, kept = config(undisturbed, "distill"), config(undisturbed, "prefer")
    assert distilled["mixers"] == kept["mixers"] == ["latent_attention"] * 2
    report = next(undisturbed.glob("runs/*/report.md")).read_text()
    assert "## Gates" in report and "after prefer" in report


def test_transmla_trains_the_converted_model_on_every_token(transmla: Path) -> None:
    found = result(transmla, "train")
    assert found["steps"] == 6 and found["tokens"] == 6 * 128
    assert config(transmla, "train")["mixers"] == ["latent_attention"] * 2
    for stage in ("evaluate_converted", "evaluate"):
        measured = result(transmla, stage)
        assert measured["kv_bytes_per_token_measured"] == measured["kv_bytes_per_token_predicted"] > 0
    assert result(transmla, "evaluate")["perplexity"] != result(transmla, "evaluate_converted")["perplexity"]


def test_killed_preference_training_ends_as_undisturbed(undisturbed: Path, tmp_path: Path) -> None:
    outputs = killed_and_resumed(RUN, undisturbed, tmp_path, "prefer", "preference")
    assert deterministic_part(outputs, "prefer") == deterministic_part(undisturbed, "prefer")
    posttrain("verify", "all", cwd=tmp_path)


def test_killed_continued_pretraining_ends_as_undisturbed(transmla: Path, tmp_path: Path) -> None:
    outputs = killed_and_resumed(TRANSMLA, transmla, tmp_path, "train", "sft")
    assert deterministic_part(outputs, "train") == deterministic_part(transmla, "train")
    posttrain("verify", "all", cwd=tmp_path)
