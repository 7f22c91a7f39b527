"""Training stages on several ranks (torchrun's agent, gloo): the same numbers as one, and nothing hangs or is lost."""

from __future__ import annotations

import json
import os
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
    wait_for,
    worker_pid,
)

TWO = ["engine=ddp", "engine.device=cpu", "engine.ranks=2"]
DISTILL = ["run", "x_ecomla", "scale=smoke", "--until", "distill", *TWO]
TOLERANCE = 1e-5
"""Relative: sums over ranks are rounded in another order than sums over micro-batches."""


def history(outputs: Path, stage: str) -> list[dict[str, float]]:
    lines = (artifact(outputs, stage) / "history" / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ranks_of(worker: int) -> dict[int, int]:
    """Rank to process id, of the ranks that a worker has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != worker or b"posttrain.launch.rank" not in (folder / "cmdline").read_bytes():
                continue
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        rank = next((int(entry[5:]) for entry in variables if entry.startswith(b"RANK=")), None)
        if rank is not None:
            found[rank] = int(folder.name)
    return found


@pytest.fixture(scope="module")
def two_ranks(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder of a run on two ranks that nothing disturbed; what it shares comes from the store."""
    folder = tmp_path_factory.mktemp("two_ranks")
    copy_store_without(undisturbed, folder / "outputs", "distill", "preference", "evaluate")
    posttrain("run", "x_ecomla", "scale=smoke", "~stages.evaluate", "~stages.evaluate_converted", *TWO, cwd=folder)
    return folder / "outputs"


@pytest.mark.parametrize("stage", ["distill", "prefer"])
def test_two_ranks_give_the_loss_curve_of_one(stage: str, undisturbed: Path, two_ranks: Path) -> None:
    one, two = history(undisturbed, stage), history(two_ranks, stage)
    assert len(one) == len(two)
    for alone, shared in zip(one, two, strict=True):
        assert shared.keys() == alone.keys()
        for name, value in alone.items():
            assert shared[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-7), (alone["step"], name)
    engine = json.loads((artifact(two_ranks, stage) / "manifest.json").read_text())["engine"]
    assert (engine["ranks"], engine["strategy"]) == (2, "ddp")


def test_two_ranks_give_the_loss_curve_of_one_when_fine_tuning(tmp_path: Path) -> None:
    run = ["run", "transmla", "scale=smoke", "--until", "train"]
    posttrain(*run, "engine=cpu", cwd=tmp_path)
    copy_store_without(tmp_path / "outputs", tmp_path / "two" / "outputs", "sft")
    posttrain(*run, *TWO, cwd=tmp_path / "two")
    one, two = history(tmp_path / "outputs", "train"), history(tmp_path / "two" / "outputs", "train")
    for alone, shared in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "lr", "entropy", "mean_token_accuracy"):
            assert shared[name] == pytest.approx(alone[name], rel=TOLERANCE), (alone["step"], name)


def training(outputs: Path, tmp_path: Path) -> tuple[int, dict[int, int], object]:
    """A run on two ranks, the first of which stands after its third step: the worker's pid, its ranks, the command."""
    command, first = start_and_pause(*DISTILL, cwd=tmp_path, event=step_of("distill", 3))
    pid = worker_pid(outputs, "distill")
    ranks = ranks_of(pid)
    assert len(ranks) == 2 and ranks[0] == first
    return pid, ranks, command


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_a_clear_failure_in_seconds_and_resumes(
    victim: int, undisturbed: Path, two_ranks: Path, tmp_path: Path
) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    pid, ranks, command = training(outputs, tmp_path)
    began = time.monotonic()
    kill(ranks[victim])
    thaw(ranks[0])
    assert command.wait(timeout=30) == 1
    assert time.monotonic() - began < 30
    said = (tmp_path / "command.log").read_text()
    assert f"rank {victim} of 2 (process {ranks[victim]}) was killed by signal 9" in said
    assert "posttrain resume" in said and "Traceback" not in said
    assert all(gone(process) for process in ranks.values())
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "distill") == deterministic_part(two_ranks, "distill")


def test_ranks_end_with_their_worker(undisturbed: Path, two_ranks: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    pid, ranks, command = training(outputs, tmp_path)
    kill(pid)
    wait_for(lambda: all(gone(process) for process in ranks.values()), "the ranks' end", seconds=5)
    assert command.wait(timeout=30) == 1
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "distill") == deterministic_part(two_ranks, "distill")


def test_ranks_agree_to_stop(undisturbed: Path, two_ranks: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    pid, ranks, command = training(outputs, tmp_path)
    (work_dir,) = outputs.glob("store/distill/.work-*")
    (work_dir / "STOP").touch()
    thaw(ranks[0])
    assert command.wait(timeout=60) == 75
    assert json.loads((work_dir / "outcome.json").read_text())["step"] in (3, 4)
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(outputs, "distill") == deterministic_part(two_ranks, "distill")


def test_ranks_that_cannot_share_are_refused_before_anything_runs(tmp_path: Path) -> None:
    shared = posttrain(*DISTILL[:-1], "engine.ranks=3", cwd=tmp_path, check=False)
    assert shared.returncode == 2
    assert "stage distill: 4 sequences a step cannot be shared by 3 ranks" in shared.stderr
    assert "engine.ranks" in shared.stderr
    alone = posttrain("run", "x_ecomla", "scale=smoke", "engine=cpu", "engine.ranks=2", cwd=tmp_path, check=False)
    assert alone.returncode == 2 and "write engine=ddp" in alone.stderr
    assert not (tmp_path / "outputs").exists()
    assert os.listdir(tmp_path) in ([], ["cache"])
