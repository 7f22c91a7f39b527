"""The riskpo recipe by the real command: killed -9 or stopped while it learns, it ends as an undisturbed run does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from harness import (
    artifact,
    copy_store_without,
    deterministic_part,
    kill,
    posttrain,
    start_and_pause,
    step_of,
    thaw,
)

LEARN = [
    "run",
    "riskpo",
    "scale=smoke",
    "--until",
    "rl",
    "stages.rl.risk.bundles=stratified",
    # Random weights solve no problem: without a reward that they earn nothing would be learnt, and nothing be shown.
    "stages.rl.rewards.correct.type=gym",
    "stages.rl.rewards.letters={type: regex, pattern: '[a-m]', match: search}",
    "stages.rl.risk_reward=letters",
]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder of a run to the end of `rl` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("learnt")
    posttrain(*LEARN, cwd=folder)
    return folder / "outputs"


def rows(outputs: Path, name: str) -> list[dict]:
    lines = (artifact(outputs, "rl") / "history" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_a_run_leaves(learnt: Path) -> None:
    history, kept = rows(learnt, "history.jsonl"), rows(learnt, "completions.jsonl")
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert {"reward", "loss", "risk/q_beta", "questions/zero_variance", "rollout/logprob_gap"} <= history[0].keys()
    assert [row["step"] for row in kept] == [step for step in range(4) for _ in range(4)]
    assert kept[0]["prompt"].endswith("<|im_start|>assistant\n") and kept[0]["rewards"].keys() == {"correct", "letters"}
    manifest = json.loads((artifact(learnt, "rl") / "manifest.json").read_text())
    result = manifest["metrics"]["result"]
    assert (result["steps"], result["rollouts"], result["completions"]) == (4, 4, 80)
    assert result["first_reward"] == history[0]["reward"] > 0 and result["questions"] + result["left_out"] == 32
    assert min(row["grad_norm"] for row in history) > 0
    assert manifest["key_document"]["external"]["rewards"].keys() == {"correct"}
    timing = manifest["metrics"]["timing"]
    assert timing["rollout"] == "engine" and min(timing["parts"].values()) >= 0


def interrupted(learnt: Path, folder: Path, step: int) -> tuple[subprocess.Popen[bytes], int]:
    """A run that stands still after that step: the command, and the worker's pid."""
    copy_store_without(learnt, folder / "outputs", "riskpo")
    return start_and_pause(*LEARN, cwd=folder, event=step_of("rl", step))


def test_killed_and_resumed_equals_undisturbed(learnt: Path, tmp_path: Path) -> None:
    runner, pid = interrupted(learnt, tmp_path, step=3)
    kill(pid)
    assert runner.wait(timeout=60) != 0
    posttrain("resume", cwd=tmp_path)
    outputs = tmp_path / "outputs"
    assert deterministic_part(outputs, "rl") == deterministic_part(learnt, "rl")
    for name in ("history.jsonl", "completions.jsonl"):
        assert rows(outputs, name) == rows(learnt, name)
    assert not list(outputs.glob("store/*/.work-*"))


@pytest.mark.slow
def test_stopped_and_resumed_equals_undisturbed(learnt: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    runner, pid = interrupted(learnt, tmp_path, step=1)
    (work_dir,) = outputs.glob("store/riskpo/.work-*")
    (work_dir / "STOP").touch()
    thaw(pid)
    assert runner.wait(timeout=60) == 75
    step = json.loads((work_dir / "outcome.json").read_text())["step"]
    assert step in (1, 2) and (work_dir / "checkpoints" / f"checkpoint-{step}" / "COMPLETE").is_file()
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "rl") == deterministic_part(learnt, "rl")
