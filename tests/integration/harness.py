"""Runs the real command in its own process, and stops it at chosen moments."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.testing import Pause

ROOT = Path(__file__).parents[2]
RUN = ["run", "x_ecomla", "scale=smoke"]
DEADLINE = 300.0


def environment(cache: Path, extra_path: Path | None = None) -> dict[str, str]:
    paths = os.pathsep.join(str(path) for path in (extra_path, ROOT, ROOT / "kernels") if path is not None)
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "POSTTRAIN_CACHE": str(cache)}


def posttrain(
    *arguments: str, cwd: Path, check: bool = True, extra_path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """One command to its end. With `check`, a non-zero exit fails the test and shows the output."""
    done = subprocess.run(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=cwd,
        env=environment(cwd / "cache", extra_path),
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
        stdin=subprocess.DEVNULL,
    )
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*arguments: str, cwd: Path, extra_path: Path | None = None) -> subprocess.Popen[bytes]:
    """The same command, left running; its output goes to `cwd/command.log`."""
    log = (cwd / "command.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain", *arguments],
        cwd=cwd,
        env=environment(cwd / "cache", extra_path),
        stdout=log,
        stderr=log,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def start_and_pause(
    *arguments: str, cwd: Path, event: dict[str, Any] | None = None, opening: str | None = None
) -> tuple[subprocess.Popen[bytes], int]:
    """The same command, left running until the moment that `Pause` describes: it, and the process that stands still."""
    pause = Pause(cwd, event=event, opening=opening)
    command = start(*arguments, cwd=cwd, extra_path=pause.path)

    def stands() -> bool:
        assert command.poll() is None, f"it ended before {event or opening}\n{(cwd / 'command.log').read_text()}"
        return pause.pid is not None

    wait_for(stands, str(event or opening))
    assert (pid := pause.pid) is not None
    return command, pid


def step_of(stage: str, step: int) -> dict[str, Any]:
    """The event of a stage's optimiser step."""
    return {"event": "metrics", "stage": stage, "step": step}


def wait_for(condition: Callable[[], object], what: str, seconds: float | None = None) -> None:
    """Wait for something that stays."""
    end = time.monotonic() + (seconds or DEADLINE)
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.01)


def events(outputs: Path) -> list[dict]:
    found = []
    for path in outputs.glob("runs/*/events.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def has_event(outputs: Path, event: str, stage: str, **values: object) -> bool:
    return any(
        item["event"] == event
        and item["stage"] == stage
        and all(item.get(key) == value for key, value in values.items())
        for item in events(outputs)
    )


def worker_pid(outputs: Path, stage: str) -> int:
    return [item["pid"] for item in events(outputs) if item["event"] == "stage_started" and item["stage"] == stage][-1]


def artifact(outputs: Path, stage: str) -> Path:
    run = next(outputs.glob("runs/*/run.json"))
    entry = next(item for item in json.loads(run.read_text())["stages"] if item["name"] == stage)
    return outputs / entry["artifact"]


def deterministic_part(outputs: Path, stage: str) -> dict:
    """What two runs of the same key must share bit for bit: every file's digest and the `result` metrics."""
    manifest = json.loads((artifact(outputs, stage) / "manifest.json").read_text())
    return {
        "files": {name: output["files"] for name, output in manifest["outputs"].items()},
        "result": manifest["metrics"]["result"],
    }


def copy_store_without(base: Path, target: Path, *types: str) -> None:
    """A new outputs folder that has the artifacts of `base`, except those of the given stage types."""
    shutil.copytree(base / "store", target / "store", symlinks=True, ignore=lambda _, names: set(types) & set(names))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def thaw(pid: int) -> None:
    """Let a stopped process go on; nothing when it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"
