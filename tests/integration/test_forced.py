"""Stages that are to run again although their artifact is there: killed, outlived, resumed beside a live run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

from harness import (
    RUN,
    artifact,
    deterministic_part,
    events,
    posttrain,
    start,
    start_and_pause,
    step_of,
    thaw,
    wait_for,
)

from posttrain.pipeline.store import manifest_digest, read_artifact

FORCED = ("--force", "distill", "stages.distill.save_every=2")


def told(outputs: Path, before: int, event: str) -> list[str]:
    return [one["stage"] for one in events(outputs)[before:] if one["event"] == event]


def test_a_forced_stage_that_was_killed_goes_on_where_it_stopped_and_no_further(
    copied: Path, undisturbed: Path
) -> None:
    """The artifact that was there before is back meanwhile, and is not what the resumed run takes."""
    outputs, until = copied / "outputs", ("--until", "distill", "--force", "distill", "stages.distill.save_every=2")
    manifest = artifact(outputs, "distill") / "manifest.json"
    shutil.rmtree(outputs / "store" / "evaluate")
    before, inode = len(events(outputs)), manifest.stat().st_ino
    runner, pid = start_and_pause(*RUN, *until, cwd=copied, event=step_of("distill", 3))
    os.kill(pid, signal.SIGKILL)
    assert runner.wait(timeout=60) == 1 and manifest.stat().st_ino == inode
    posttrain("resume", cwd=copied)
    told = [one for one in events(outputs)[before:] if one["stage"] == "distill"]
    starts = [index for index, one in enumerate(told) if one["event"] == "stage_started"]
    assert len(starts) == 2 and told[-1]["event"] == "stage_finished"
    assert min(one["done"] for one in told[starts[1] :] if one["event"] == "progress") > 2
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")
    assert not (outputs / "store" / "evaluate").exists(), "what --until left out was run"
    before = len(events(outputs))
    posttrain("resume", cwd=copied)
    assert {one["event"] for one in events(outputs)[before:]} == {"run_started", "stage_cached", "run_finished"}


def test_a_resume_beside_a_live_run_does_not_do_it_once_more(copied: Path, undisturbed: Path) -> None:
    outputs = copied / "outputs"
    before = len(events(outputs))
    runner, pid = start_and_pause(*RUN, *FORCED, "--until", "distill", cwd=copied, event=step_of("distill", 3))
    other = start("resume", cwd=copied)
    wait_for(lambda: "following it" in (copied / "command.log").read_text(), "the second command")
    thaw(pid)
    assert runner.wait(timeout=120) == 0 and other.wait(timeout=120) == 0
    assert told(outputs, before, "stage_started") == ["distill"]
    assert deterministic_part(outputs, "distill") == deterministic_part(undisturbed, "distill")


def test_what_a_worker_published_after_its_runners_death_is_taken_and_its_descendants_are_made_anew(
    copied: Path,
) -> None:
    outputs = copied / "outputs"
    give_other_bits(artifact(outputs, "distill"))
    before = len(events(outputs))
    last = max(one["step"] for one in events(outputs) if one["event"] == "metrics" and one["stage"] == "distill")
    runner, pid = start_and_pause(*RUN, *FORCED, cwd=copied, event=step_of("distill", last))
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    thaw(pid)
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the end of the worker that was left")
    posttrain("resume", cwd=copied)
    started = told(outputs, before, "stage_started")
    assert started.count("distill") == 1 and {"prefer", "evaluate"} <= set(started)
    before = len(events(outputs))
    posttrain("resume", cwd=copied)
    assert told(outputs, before, "stage_started") == []


def give_other_bits(folder: Path) -> None:
    """An artifact as another machine might have made it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    file = folder / "model" / "config.json"
    content = file.read_bytes() + b"\n"
    file.unlink()  # files of artifacts may be linked
    file.write_bytes(content)
    facts = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    manifest["outputs"]["model"]["files"]["config.json"] |= facts
    del manifest["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}))
    read_artifact(folder)


def test_a_resume_names_what_the_run_left_out(copied: Path) -> None:
    shutil.rmtree(copied / "outputs" / "store" / "evaluate")
    posttrain(*RUN, "--only", "distill", cwd=copied)
    said = posttrain("resume", cwd=copied).stdout
    assert "left out when the run was last started: evaluate_converted, evaluate;" in said
