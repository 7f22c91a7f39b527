"""Commands that pretend to be Slurm's: they note what they are asked; what becomes of jobs is up to a test."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "srun")


class FakeSlurm:
    """The folder in which the fake commands keep their jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            path = self.bin / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {folder} {name} "$@"\n')
            path.chmod(path.stat().st_mode | stat.S_IEXEC)

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def named(self, command: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == command]

    def state(self, job: str) -> str:
        return (self.folder / f"job-{job}").read_text()

    def set(self, job: str, state: str) -> None:
        """PENDING, RUNNING, COMPLETING, or any other word for a job that is over."""
        (self.folder / f"job-{job}").write_text(state)

    def refuse(self, command: str, after: int = 0) -> None:
        """Have a command fail from its call number `after` (from 0) on."""
        (self.folder / f"refuse-{command}").write_text(str(after))

    def start_steps(self, *names: str, endless: bool = False) -> None:
        """Have steps run, named JOB.STEP as squeue does; those that are endless survive SIGKILL."""
        for name in names:
            (self.folder / f"step-{name}").write_text("endless" if endless else "")

    @property
    def steps(self) -> list[str]:
        """Names of the steps that run."""
        return sorted(path.name.removeprefix("step-") for path in self.folder.glob("step-*"))

    def answer_srun(self, code: int, files: dict[str, Any]) -> None:
        """Have srun leave JSON files in the work folder that its command names, and end with a code."""
        (self.folder / "srun").write_text(json.dumps([code, files]))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the last sbatch."""
        return json.loads((self.folder / "environment").read_text())


def _main(folder: Path, command: str, arguments: list[str]) -> int:
    calls = folder / "calls"
    before = [json.loads(line)[0] for line in calls.read_text().splitlines()] if calls.exists() else []
    with calls.open("a") as file:
        file.write(json.dumps([command, *arguments]) + "\n")
    refuse = folder / f"refuse-{command}"
    if refuse.exists() and before.count(command) >= int(refuse.read_text()):
        print(f"{command}: error: Invalid account or account/partition combination specified", file=sys.stderr)
        return 1
    named = [word for word in arguments if not word.startswith("-")]
    if command == "sbatch":
        job = str(101 + len({path.name.partition("_")[0] for path in folder.glob("job-*")}))
        array = [line for line in Path(named[-1]).read_text().splitlines() if line.startswith("#SBATCH --array=0-")]
        tasks = [f"_{task}" for task in range(int(array[0].rpartition("-")[2]) + 1)] if array else [""]
        for task in tasks:
            (folder / f"job-{job}{task}").write_text("PENDING")
        (folder / "environment").write_text(json.dumps(dict(os.environ)))
        print(job)
    elif command == "squeue" and "--steps" in arguments:
        # An array's own number, which one of its tasks has too, stands for all tasks.
        asked = [word.partition("=")[2] for word in arguments if word.startswith("--jobs=")]
        names = [path.name.removeprefix("step-") for path in sorted(folder.glob("step-*"))]
        print(*(name for name in names if name.startswith((f"{asked[0]}.", f"{asked[0]}_"))), sep="\n")
    elif command == "squeue":
        asked = [word.partition("=")[2] for word in arguments if word.startswith("--jobs=")]
        for path in sorted(folder.glob("job-*")):
            job, state = path.name.removeprefix("job-"), path.read_text()
            if asked and asked[0] == job:
                print(state)
            elif not asked and state in ("PENDING", "RUNNING", "COMPLETING"):
                print(job, state)
    elif command == "scancel" and any("." in name for name in named):
        for path in [folder / f"step-{name}" for name in named]:
            if path.read_text() != "endless":
                path.unlink()
    elif command == "scancel":
        for job in [one for name in named for one in _with_tasks(folder, name)]:
            if "--state=PENDING" not in arguments or (folder / f"job-{job}").read_text() == "PENDING":
                (folder / f"job-{job}").write_text("CANCELLED")
    elif command == "scontrol" and named[0] == "requeue":
        (folder / f"job-{named[1]}").write_text("PENDING")
    elif command == "scontrol" and named[:2] == ["show", "hostnames"]:
        print(*named[2].split(","), sep="\n")
    elif command == "srun":
        return _srun(folder, arguments, named)
    return 0


def _srun(folder: Path, arguments: list[str], named: list[str]) -> int:
    """As `FakeSlurm.answer_srun` wants it; else the command itself, for one machine after the other."""
    if (folder / "srun").exists():
        code, files = json.loads((folder / "srun").read_text())
        for name, data in files.items():
            (Path(named[-2]) / name).write_text(json.dumps(data))
        return code
    command = arguments[arguments.index(named[0]) :]
    hosts = os.environ["SLURM_JOB_NODELIST"].split(",")
    places = [{"SLURM_PROCID": str(index), "SLURMD_NODENAME": host} for index, host in enumerate(hosts)]
    return max(subprocess.run(command, env={**os.environ, **place}).returncode for place in places)


def _with_tasks(folder: Path, job: str) -> list[str]:
    tasks = [path.name.removeprefix("job-") for path in folder.glob(f"job-{job}_*")]
    return tasks or [job]


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
