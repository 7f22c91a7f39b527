"""Faults of disks and numbers, injected into real runs: the result, or one clear message; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import (
    RUN,
    artifact,
    copy_store_without,
    deterministic_part,
    events,
    gone,
    has_event,
    kill,
    posttrain,
    start_and_pause,
    step_of,
    thaw,
)

MIB = 2**20


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Change one bit, and neither size nor times."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(int(times.st_size * at))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def in_workers(folder: Path, code: str) -> Path:
    """A folder for the path of Python that has every worker run that code before its job."""
    hook = folder / "hook"
    hook.mkdir()
    lines = [f"    {line}" for line in code.strip().splitlines()]
    (hook / "sitecustomize.py").write_text("\n".join(["import sys", "if 'worker' in sys.argv:", *lines]) + "\n")
    return hook


def started(outputs: Path) -> list[str]:
    return [event["stage"] for event in events(outputs) if event["event"] == "stage_started"]


def weights(outputs: Path, stage: str) -> Path:
    return artifact(outputs, stage) / "model" / "model.safetensors"


@pytest.fixture
def without_distill(undisturbed: Path, tmp_path: Path) -> Path:
    copy_store_without(undisturbed, tmp_path / "outputs", "distill")
    return tmp_path / "outputs"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = place / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(place).free - leave))
    return ballast


@pytest.mark.parametrize("spoil", [flip_bit, cut], ids=["bit flipped", "cut short"])
def test_a_damaged_input_is_made_again_and_said(
    spoil, undisturbed: Path, without_distill: Path, tmp_path: Path
) -> None:
    outputs = without_distill
    folder = artifact(undisturbed, "upcycle").relative_to(undisturbed)
    spoil(outputs / folder / "model" / "model.safetensors")
    done = posttrain(*RUN, cwd=tmp_path)
    how = "its artifact is damaged (changed: model/model.safetensors)"
    if spoil is flip_bit:
        assert f"upcycle: {how}; it is made again" in done.stdout
    else:
        plan = posttrain("plan", "x_ecomla", "scale=smoke", cwd=tmp_path)
        assert "its artifact is damaged" not in plan.stdout, "made again, it is whole"
    # Made again bit for bit, so that what had been made from it stands.
    counts = {stage: started(outputs).count(stage) for stage in ("upcycle", "prefer", "evaluate_converted")}
    assert counts == {"upcycle": 1, "prefer": 0, "evaluate_converted": 0}
    assert deterministic_part(outputs, "upcycle") == deterministic_part(undisturbed, "upcycle")
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")
    posttrain("verify", "all", cwd=tmp_path)
    assert len(list(outputs.glob("store/mla_upcycle/.damaged-*"))) == 1
    assert "damaged; it was made again" in posttrain("clean", cwd=tmp_path).stdout


def test_a_plan_sees_a_file_that_was_cut_short(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "outputs", symlinks=True)
    cut(weights(tmp_path / "outputs", "upcycle"))
    plan = posttrain("plan", "x_ecomla", "scale=smoke", cwd=tmp_path).stdout
    assert "its artifact is damaged (changed: model/model.safetensors) and is made again" in plan


def test_an_input_that_is_damaged_again_fails_with_its_name(without_distill: Path, tmp_path: Path) -> None:
    """A disk that spoils what was just made: told apart from one bad file by trying once."""
    outputs = without_distill
    spoiling = """
import posttrain.launch.execute as execute
real = execute.check_inputs
def check_inputs(job):
    if job.stage == "distill":
        path = job.inputs["student"]["path"] + "/model.safetensors"
        content = bytearray(open(path, "rb").read())
        content[-1] ^= 1
        open(path, "wb").write(content)
    real(job)
execute.check_inputs = check_inputs
"""
    hook = in_workers(tmp_path, spoiling)
    done = posttrain(*RUN, cwd=tmp_path, check=False, extra_path=hook)
    assert done.returncode == 1
    assert started(outputs).count("upcycle") == 1
    assert "student: changed: model/model.safetensors" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    name: str, undisturbed: Path, without_distill: Path, tmp_path: Path
) -> None:
    outputs = without_distill
    command, pid = start_and_pause(*RUN, cwd=tmp_path, event=step_of("distill", 5))
    complete = "store/distill/.work-*/checkpoints/checkpoint-4/COMPLETE"
    kill(pid)
    thaw(pid)
    assert command.wait(timeout=60) == 1
    (marker,) = outputs.glob(complete)
    flip_bit(marker.parent / name)
    posttrain("resume", cwd=tmp_path)
    log = "".join(path.read_text() for path in outputs.glob("runs/*/logs/distill/attempt_2.log"))
    assert f"checkpoint of step 4 is not used and deleted: the content of {name} is not what was written" in log
    assert "going on from step 2" in log
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")


def test_a_loss_that_is_no_number_stops_and_names_the_checkpoint(without_distill: Path, tmp_path: Path) -> None:
    done = posttrain(*RUN, "stages.distill.lr=1e30", "stages.distill.save_every=1", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    complete = without_distill.glob("store/distill/.work-*/checkpoints/checkpoint-*/COMPLETE")
    kept = max(complete, key=lambda marker: int(marker.parent.name.removeprefix("checkpoint-")))
    step = kept.parent.name.removeprefix("checkpoint-")
    assert f"is nan at step {int(step) + 1}; the checkpoint of step {step} is kept in {kept.parent}" in done.stderr
    assert "stages.distill.lr=" in done.stderr


def test_a_disk_that_is_too_small_is_said_before_the_first_step(small_disk: Path, undisturbed: Path) -> None:
    copy_store_without(undisturbed, small_disk / "outputs", "distill")
    fill(small_disk, MIB)
    done = posttrain(*RUN, "--yes", cwd=small_disk, check=False)
    assert done.returncode == 1 and "too little space: checkpoints and results need" in done.stderr
    assert not has_event(small_disk / "outputs", "metrics", "distill")


@pytest.mark.parametrize("leave", [0, 100_000], ids=["full", "nearly full"])
def test_a_disk_that_fills_up_while_training_is_one_message_and_resumes(
    leave: int, small_disk: Path, undisturbed: Path
) -> None:
    outputs = small_disk / "outputs"
    copy_store_without(undisturbed, outputs, "distill")
    # Between two checkpoints: the first is complete, the second will not fit.
    command, pid = start_and_pause(*RUN, cwd=small_disk, event=step_of("distill", 3))
    ballast = fill(small_disk, leave)
    thaw(pid)
    assert command.wait(timeout=60) == 1
    said = (small_disk / "command.log").read_text()
    ballast.unlink()
    if leave:
        assert "the disk is full" in said and "Traceback" not in said
    assert gone(pid)
    (kept,) = outputs.glob("store/distill/.work-*/checkpoints/checkpoint-*")
    assert kept.name == "checkpoint-2" and (kept / "COMPLETE").exists(), "the last good one, and no half one"
    posttrain("resume", cwd=small_disk)
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")


def test_a_read_only_place_is_refused_before_anything_runs(small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = posttrain(*RUN, f"paths.outputs={small_disk}/outputs", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(small_disk) in done.stderr and "paths.outputs=FOLDER" in done.stderr


def test_a_place_that_becomes_read_only_is_one_message_and_resumes(
    undisturbed: Path, without_distill: Path, tmp_path: Path
) -> None:
    """A file system in use cannot be made read-only from outside: the kernel's answer is put in."""
    refusing = """
import posttrain.training.checkpoints as checkpoints
real = checkpoints.begin
def begin(folder, step):
    if step == 4:
        raise OSError(30, "Read-only file system", str(folder))
    return real(folder, step)
checkpoints.begin = begin
"""
    done = posttrain(*RUN, cwd=tmp_path, check=False, extra_path=in_workers(tmp_path, refusing))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "the file system is read-only" in done.stderr and "/checkpoints" in done.stderr
    posttrain("resume", cwd=tmp_path)
    assert deterministic_part(without_distill, "distill") == deterministic_part(undisturbed, "distill")
    attempts = json.loads((artifact(without_distill, "distill") / "manifest.json").read_text())["attempts"]
    assert attempts == 2
