"""A lock file: flock decides who holds it, its content says who that is (pid and start time)."""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same pid by its start time."""

    pid: int
    start: str

    def alive(self) -> bool:
        return self.pid > 0 and start_time(self.pid) == self.start

    def to_json(self) -> dict[str, int | str]:
        return {"pid": self.pid, "start": self.start}


class LockHeld(Exception):
    """Somebody else holds the lock; `owner` is None while it has not written who it is."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} is held by process {owner.pid if owner else 'unknown'}")
        self.owner = owner


def start_time(pid: int) -> str | None:
    """When a process started, as an opaque text; None when there is no such process (or it is a zombie)."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return _start_time_without_proc(pid)
    try:
        # The command's name may hold spaces and brackets: fields are counted after its last bracket.
        fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _start_time_without_proc(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.NoSuchProcess:
        return None


def this_process() -> Owner:
    """The calling process."""
    return Owner(os.getpid(), start_time(os.getpid()) or "")


class Lock:
    """An exclusive lock, held until `release` or the end of the process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, path: Path, patience: float = 1.0) -> Lock:
        """Take the lock; tries for `patience` seconds, since a reader of the lock holds it for an instant.

        Raises:
            LockHeld: somebody else has it.
        """
        deadline = time.monotonic() + patience
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                # Somebody removed the folder just now.
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise LockHeld(path, _read_owner(path)) from None
                time.sleep(0.05)
                continue
            if _same_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(this_process().to_json()).encode(), 0)
                return cls(path, descriptor)
            # The folder was removed and made anew between open and flock: this lock is on a file nobody sees.
            os.close(descriptor)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def held(path: Path) -> bool:
    """Whether somebody holds that lock now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holder(path: Path) -> Owner | None:
    """Who holds that lock now; None when nobody does or it has not yet said who it is."""
    return _read_owner(path) if held(path) else None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


def _read_owner(path: Path) -> Owner | None:
    try:
        data = json.loads(path.read_text())
        return Owner(int(data["pid"]), str(data["start"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
