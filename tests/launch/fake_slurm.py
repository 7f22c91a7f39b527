"""Commands that pretend to be Slurm's: they note what they are asked; what becomes of jobs is up to a test."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol")


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
    elif command == "squeue":
        asked = [word.partition("=")[2] for word in arguments if word.startswith("--jobs=")]
        for path in sorted(folder.glob("job-*")):
            job, state = path.name.removeprefix("job-"), path.read_text()
            if asked and asked[0] == job:
                print(state)
            elif not asked and state in ("PENDING", "RUNNING", "COMPLETING"):
                print(job, state)
    elif command == "scancel":
        for job in [one for name in named for one in _with_tasks(folder, name)]:
            if "--state=PENDING" not in arguments or (folder / f"job-{job}").read_text() == "PENDING":
                (folder / f"job-{job}").write_text("CANCELLED")
    elif command == "scontrol" and named[0] == "requeue":
        (folder / f"job-{named[1]}").write_text("PENDING")
    return 0


def _with_tasks(folder: Path, job: str) -> list[str]:
    tasks = [path.name.removeprefix("job-") for path in folder.glob(f"job-{job}_*")]
    return tasks or [job]


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
