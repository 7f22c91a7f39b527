"""For tests of packages that add to posttrain: the real command in a process of its own, interrupted where one likes.

Failures are AssertionErrors that show what the command said. docs/extending.md has an example.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

SECONDS = 300.0
"""Longest time for one command."""

_PLAN = """
import sys
from posttrain.cli.main import main
sys.argv = ["posttrain", "plan", *sys.argv[1:]]
try:
    main()
except SystemExit as error:
    if error.code:
        raise
heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
assert not heavy, f"a plan imported {heavy}: import them inside the functions that run"
"""


_HOOK = """
import fnmatch, os, signal, sys

def stand_still():
    if not os.path.exists({said!r}):
        with open({said!r} + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.replace({said!r} + ".new", {said!r})
        os.kill(os.getpid(), signal.SIGSTOP)

if "worker" in sys.argv or "posttrain.launch.rank" in sys.orig_argv:
    event, opening = {event!r}, {opening!r}
    if event:
        from posttrain.pipeline.events import EventLog
        append = EventLog.append
        def append_and_look(self, name, stage=None, **fields):
            record = append(self, name, stage, **fields)
            if event.items() <= record.items():
                stand_still()
            return record
        EventLog.append = append_and_look
    if opening:
        def look(name, arguments):
            if name == "open" and isinstance(arguments[0], str) and fnmatch.fnmatch(arguments[0], opening):
                stand_still()
        sys.addaudithook(look)
"""


class Pause:
    """Has the process that does a stage's work stop itself (SIGSTOP) at one moment, the first time that it comes.

    Nothing is timed: however loaded the machine, the process stands exactly there until it is killed or let go on.

    Args:
        folder: where the hook is put, a folder of its own: the commands to be stopped have `path` on their PYTHONPATH.
        event: items of the event after whose writing the process stops, such as
            `{"event": "metrics", "stage": "train", "step": 3}`.
        opening: pattern (fnmatch) of the file before whose opening by Python it stops.
    """

    def __init__(self, folder: Path, *, event: dict[str, Any] | None = None, opening: str | None = None) -> None:
        self.path = folder / "pause"
        self.path.mkdir(parents=True)
        self._said = self.path / "pid"
        text = _HOOK.format(said=str(self._said.resolve()), event=event, opening=opening)
        (self.path / "sitecustomize.py").write_text(text, encoding="utf-8")

    @property
    def pid(self) -> int | None:
        """The process that stands still; None before that moment."""
        if not self._said.exists():
            return None
        pid = int(self._said.read_text(encoding="utf-8"))
        if not Path("/proc/self/stat").exists():  # not Linux: it stops right after saying so
            return pid
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "T":
                return pid
        return None


def posttrain(*arguments: str, cwd: Path) -> str:
    """Run a command to its end and return what it printed. A non-zero exit is an AssertionError."""
    return _finished([sys.executable, "-m", "posttrain", *arguments], cwd)


def plan(*arguments: str, cwd: Path) -> str:
    """`posttrain plan`, which must succeed without importing torch, transformers or datasets; what it printed."""
    text = _finished([sys.executable, "-c", _PLAN, *arguments], cwd)
    assert "`posttrain run` would stop here" not in text, text
    return text


def interrupt(*arguments: str, cwd: Path, stage: str, step: int, how: Literal["stop", "kill"]) -> None:
    """Start a command and end it when the stage has logged metrics of that step.

    The process that trains stops itself there, so that it is caught between that step and the next however fast it is.
    `stop` asks the stage to save its state and end; `kill` is SIGKILL.
    """
    outputs = cwd / "outputs"
    with tempfile.TemporaryDirectory() as folder:
        pause = Pause(Path(folder), event={"event": "metrics", "stage": stage, "step": step})
        environment = _environment(cwd)
        paths = (str(pause.path), environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        with (cwd / "command.log").open("ab") as log:
            command = [sys.executable, "-m", "posttrain", *arguments]
            runner = subprocess.Popen(
                command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        end = time.monotonic() + SECONDS
        try:
            while (pid := pause.pid) is None:
                _still(runner, cwd, end, f"step {step} of stage {stage}")
                time.sleep(0.01)
            if how == "kill":
                os.kill(pid, signal.SIGKILL)
            else:
                for work in outputs.glob("store/*/.work-*"):
                    (work / "STOP").touch()
            os.kill(pid, signal.SIGCONT)
            code = runner.wait(SECONDS)
        finally:
            runner.kill()
    assert code, f"the command went on as if nothing had happened\n{_tail(cwd)}"


def artifact(outputs: Path, stage: str) -> Path:
    """The folder of a stage's artifact, in the newest run of an outputs folder."""
    run = max(outputs.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime)
    entry = next(item for item in json.loads(run.read_text(encoding="utf-8"))["stages"] if item["name"] == stage)
    return outputs / entry["artifact"]


def outcome(outputs: Path, stage: str) -> dict[str, Any]:
    """What two runs of the same key share bit for bit: the digest of every file, and the `result` metrics."""
    manifest = json.loads((artifact(outputs, stage) / "manifest.json").read_text(encoding="utf-8"))
    files = {name: output["files"] for name, output in manifest["outputs"].items()}
    return {"files": files, "result": manifest["metrics"]["result"]}


def logs(outputs: Path, stage: str) -> str:
    """What the attempts at a stage wrote."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(outputs.glob(f"runs/*/logs/{stage}/*")))


def copy_store(outputs: Path, target: Path, without: str) -> None:
    """A new outputs folder with all artifacts but those of one stage type, so that only that stage runs again."""
    ignore = shutil.ignore_patterns(without)
    shutil.copytree(outputs / "store", target / "store", symlinks=True, ignore=ignore)


def _finished(command: list[str], cwd: Path) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=_environment(cwd),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _environment(cwd: Path) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ, "POSTTRAIN_CACHE": str(cwd / "cache")}


def _still(runner: subprocess.Popen[bytes], cwd: Path, end: float, what: str) -> None:
    assert runner.poll() is None, f"the command ended before {what}\n{_tail(cwd)}"
    assert time.monotonic() < end, f"waited too long for {what}"


def _tail(cwd: Path) -> str:
    return (cwd / "command.log").read_text(encoding="utf-8")[-3000:]
