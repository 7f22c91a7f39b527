"""Engines that hold the model in shards, as a user runs them: the numbers of one rank, and nothing hangs or is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from harness import (
    artifact,
    copy_store_without,
    deterministic_part,
    gone,
    kill,
    posttrain,
    start_and_pause,
    step_of,
    thaw,
    worker_pid,
)
from test_ranks import TOLERANCE, history, ranks_of

# Starting DeepSpeed in several processes of a loaded machine takes its time.
pytestmark = pytest.mark.timeout(900)
DISTILL = ["run", "x_ecomla", "scale=smoke", "--until", "distill", "engine.device=cpu"]
FULLY = "zero3"
"""The engine that is also killed: of the three the one that moves most."""


def on_two(strategy: str) -> list[str]:
    return [*DISTILL, f"engine={strategy}", "engine.ranks=2"]


@pytest.fixture(scope="module")
def whole(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder of a run on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("sharded")
    copy_store_without(undisturbed, folder / "outputs", "distill")
    posttrain(*on_two(FULLY), cwd=folder)
    return folder / "outputs"


def assert_numbers_of_one_rank(outputs: Path, undisturbed: Path, strategy: str, ranks: int) -> None:
    for alone, shared in zip(history(undisturbed, "distill"), history(outputs, "distill"), strict=True):
        assert shared == pytest.approx(alone, rel=TOLERANCE, abs=1e-7)
    manifest = json.loads((artifact(outputs, "distill") / "manifest.json").read_text())
    assert (manifest["engine"]["strategy"], manifest["engine"]["ranks"]) == (strategy, ranks)
    assert ("deepspeed" in manifest["versions"]) == strategy.startswith("zero")


def test_a_sharded_run_gives_the_numbers_of_one_rank(undisturbed: Path, whole: Path) -> None:
    assert_numbers_of_one_rank(whole, undisturbed, FULLY, 2)


def test_a_single_rank_shards_too(undisturbed: Path, tmp_path: Path) -> None:
    copy_store_without(undisturbed, tmp_path / "outputs", "distill")
    posttrain(*DISTILL, "engine=zero2", "engine.ranks=1", cwd=tmp_path)
    assert_numbers_of_one_rank(tmp_path / "outputs", undisturbed, "zero2", 1)


def test_a_killed_rank_is_a_clear_failure_in_seconds_and_resumes(
    undisturbed: Path, whole: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    command, first = start_and_pause(*on_two(FULLY), cwd=tmp_path, event=step_of("distill", 3))
    ranks = ranks_of(worker_pid(outputs, "distill"))
    assert len(ranks) == 2 and ranks[0] == first
    began = time.monotonic()
    kill(ranks[1])
    thaw(ranks[0])
    assert command.wait(timeout=30) == 1
    assert time.monotonic() - began < 30
    said = (tmp_path / "command.log").read_text()
    assert f"rank 1 of 2 (process {ranks[1]}) was killed by signal 9" in said and "posttrain resume" in said
    assert all(gone(process) for process in ranks.values())
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "distill") == deterministic_part(whole, "distill")


@pytest.mark.slow
def test_another_engine_goes_on_with_the_same_stage(undisturbed: Path, whole: Path, tmp_path: Path) -> None:
    """Stopped under zero3 on two ranks, gone on with under fsdp2 on one; a whole-model engine is refused."""
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    command, first = start_and_pause(*on_two(FULLY), cwd=tmp_path, event=step_of("distill", 1))
    (work_dir,) = outputs.glob("store/distill/.work-*")
    (work_dir / "STOP").touch()
    thaw(first)
    assert command.wait(timeout=60) == 75
    refused = posttrain(*DISTILL, "engine=cpu", cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "was written in shards (strategy zero3)" in refused.stderr and "engine=zero3 or" in refused.stderr
    posttrain(*DISTILL, "engine=fsdp2", "engine.ranks=1", cwd=tmp_path)
    for one, other in zip(history(outputs, "distill"), history(whole, "distill"), strict=True):
        assert one == pytest.approx(other, rel=TOLERANCE, abs=1e-7)
