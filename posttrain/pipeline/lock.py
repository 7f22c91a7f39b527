"""A lock that needs no flock: a folder of numbered files, the highest of which says who holds it.

Only three things are asked of the file system, and NFS, Lustre and object mounts with POSIX names give them: making a
name fails if it exists, listing after one's own change is current, and a touched file gets the server's time. Taking a
lock means to make the next number. Its holder touches the file every `BEAT_SECONDS`. A lock is stale when its process
is gone, which is known at once on the same machine, or, elsewhere, when it has not been touched for `STALE_SECONDS` of
the file system's own clock, or for `SILENT_SECONDS` if Slurm says that its job is over; then the next number may be
made over it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType

from posttrain.errors import StageError
from posttrain.pipeline import slurm_job

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
"""How often a holder shows that it lives, and after what silence a holder on another machine counts as dead."""
SILENT_SECONDS = 15.0
"""The same for one in a Slurm job that is over: long enough for a machine that Slurm has lost, yet still beats."""
CONTEST_SECONDS = 5.0
"""How long more than its patience a process tries to take a lock that nobody holds."""
LATE_SECONDS = 0.1
"""How long whoever made a number in vain has to take it away again before it counts as one that took the lock over."""
CLOCK_SECONDS = 30.0
"""How long the difference between this machine's clock and the file system's is taken to stay the same."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True)
class Owner:
    """A process, told apart from a later one with the same pid by its start time.

    Attributes:
        pid, start: the process, as its machine counts.
        host: the machine's name, for people.
        space: identifies the running machine and its space of process numbers (a container has its own).
        token: of one acquisition.
        job, restarts: id of the Slurm job around the process and how often it had been requeued; "" outside of one.
    """

    pid: int
    start: str
    host: str = ""
    space: str = ""
    token: str = field(default="", compare=False)
    job: str = ""
    restarts: int = 0

    @property
    def here(self) -> bool:
        """Whether the process can be looked at from this one."""
        return self.space in ("", this_space())

    def alive(self) -> bool:
        """Whether that process, on this machine, is still there."""
        return self.here and self.pid > 0 and start_time(self.pid) == self.start

    def __str__(self) -> str:
        where = "" if self.here else f" on {self.host}"
        return f"process {self.pid}{where}" + (f" (Slurm job {self.job})" if self.job else "")


class LockHeld(Exception):
    """Somebody else holds the lock; `owner` is None while it has not written who it is."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} is held by {owner or 'a process that has not said which'}")
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


@cache
def this_space() -> str:
    """This machine since its last start, and the space in which its process numbers count."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def this_process() -> Owner:
    """The calling process."""
    pid = os.getpid()
    job, restarts = slurm_job.this_job()
    host = os.environ.get("SLURMD_NODENAME") or platform.node()
    return Owner(pid, start_time(pid) or "", host, this_space(), uuid.uuid4().hex, job, restarts)


class Lock:
    """An exclusive lock, held until `release` or the end of the process.

    Attributes:
        path: the lock's folder.
        lost: whether it was taken over, because this process could not touch it for `STALE_SECONDS`.
    """

    def __init__(self, path: Path, file: Path, owner: Owner, on_lost: Callable[[], None] | None) -> None:
        self.path, self.lost = path, False
        self._file, self._owner, self._on_lost = file, owner, on_lost
        self._end = threading.Event()
        threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True).start()

    @classmethod
    def acquire(cls, path: Path, patience: float = 1.0, on_lost: Callable[[], None] | None = None) -> Lock:
        """Take the lock, or try to for `patience` seconds.

        Args:
            on_lost: called from another thread if the lock is taken over or removed while it is held.

        Raises:
            LockHeld: somebody else has it.
        """
        deadline = time.monotonic() + patience
        while True:
            before = _newest(path)
            # Read before it is judged: once its holder has let go, the next one may make a file of the same number,
            # which is not the one that was found to hold nothing.
            replaced = _token(before)
            taken = before is not None and _holds(before)
            if not taken:
                owner = this_process()
                file = _take(path, before, replaced, owner)
                if file is not None:
                    return cls(path, file, owner, on_lost)
            # A free lock that others snatch away again and again is worth some more tries than one that is held.
            if time.monotonic() > deadline + (0.0 if taken else CONTEST_SECONDS):
                raise LockHeld(path, _read_owner(before) if before is not None else None)
            # Of two that want the next number and both back out, one comes first the next time.
            time.sleep(0.02 + 0.03 * random.random())

    @property
    def held(self) -> bool:
        """Whether the lock is still this one: looked up on the disk."""
        return _answer(self._is_ours)

    def _is_ours(self) -> bool:
        """Raises OSError where the file system cannot tell now."""
        if _newest(self.path) != self._file:
            # A higher number may be that of somebody who came too late, sees so and takes it away again.
            time.sleep(LATE_SECONDS)
            if _newest(self.path) != self._file:
                return False
        return self._is_there()

    def _is_there(self) -> bool:
        """Whether our file is there, whatever others are; raises OSError where the file system cannot tell now."""
        try:
            text = self._file.read_text()
        except FileNotFoundError:
            return False
        return f'"{self._owner.token}"' in text

    def require(self) -> None:
        """Raises StageError when somebody else has taken the lock over."""
        if self.lost or not self.held:
            what = f"another process has taken over {self.path.parent}, since this one showed no life for a while"
            raise StageError(what, str(self.path), "nothing: the other one goes on with the work")

    def release(self) -> None:
        if not self._end.is_set():
            self._end.set()
            # The folder may have been removed, or removed and made again with somebody else's lock of this number.
            # Ours is taken away whatever higher numbers there are: left behind, it would be held while we live.
            with contextlib.suppress(OSError):
                if _answer(self._is_there):
                    self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._file)
                    continue
                if self._end.is_set():
                    return
                self.lost = True
                if self._on_lost is not None:
                    self._on_lost()
                return

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _answer(ask: Callable[[], bool]) -> bool:
    """What the file system says: a server that does not answer has not taken a lock away, and is asked again."""
    for pause in (0.05, 0.5, 2.0):
        try:
            return ask()
        except OSError:
            time.sleep(pause)
    return ask()


def held(path: Path) -> bool:
    """Whether somebody holds that lock now."""
    newest = _newest(path)
    return newest is not None and _holds(newest)


def holder(path: Path) -> Owner | None:
    """Who holds that lock now; None when nobody does or it has not yet said who it is."""
    newest = _newest(path)
    return _read_owner(newest) if newest is not None and _holds(newest) else None


def _newest(path: Path) -> Path | None:
    """The file with the highest number."""
    numbers = [int(name) for name in _names(path) if name.isdigit()]
    return path / str(max(numbers)) if numbers else None


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _take(path: Path, before: Path | None, replaced: str | None, owner: Owner) -> Path | None:
    """Make the number after `before`, which holds nothing any more; None when somebody else was quicker.

    `replaced` is the token that `before` had when it was looked at.
    """
    if before is not None and (replaced is None or _token(before) != replaced):
        return None  # gone since we looked: numbers may have started anew
    file = path / str(int(before.name) + 1 if before is not None else 1)
    try:
        if path.is_file():
            path.unlink()  # a lock as earlier versions made it
        path.mkdir(parents=True, exist_ok=True)
        _make(file, json.dumps(asdict(owner)))
    except FileNotFoundError:
        # Somebody removed the folder just now.
        return None
    except FileExistsError:
        # Made by somebody else; or by us, where the server's answer was lost and the question was asked again.
        if _token(file) != owner.token:
            return None
    # Whoever makes a number takes away those before it. If `before` is gone, somebody did so between our look and now.
    if _newest(path) != file or _token(before) != replaced:
        file.unlink(missing_ok=True)
        return None
    for name in _names(path):
        if name.isdigit() and name != file.name:
            with contextlib.suppress(OSError):
                (path / name).unlink()
    return file


def _token(file: Path | None) -> str | None:
    """What tells the holder that made a file from all others: "" if it does not say; None if there is no such file."""
    if file is None or not file.exists():
        return None
    owner = _read_owner(file)
    return owner.token if owner is not None else ""


def _make(file: Path, text: str) -> None:
    """Make a file with that content at once, or raise FileExistsError."""
    aside = file.with_name(f".{uuid.uuid4().hex}")
    try:
        aside.write_text(text)
        os.link(aside, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # No hard links here: the name is still made by one process alone, its content follows.
        with file.open("x") as new:
            new.write(text)
    finally:
        aside.unlink(missing_ok=True)


def _holds(file: Path) -> bool:
    """Whether the process that made that file still has the lock."""
    owner = _read_owner(file)
    if owner is not None and owner.here:
        return owner.alive()
    try:
        # Opened first: a network file system then asks its server for the file's times.
        with file.open("rb") as opened:
            touched = os.fstat(opened.fileno()).st_mtime
    except OSError:
        return False
    silence = _file_system_time(file.parent) - touched
    if silence < SILENT_SECONDS or owner is None or not owner.job:
        return silence < STALE_SECONDS
    return silence < STALE_SECONDS and not slurm_job.is_over(owner.job, owner.restarts)


_clocks: dict[int, tuple[float, float]] = {}
"""Device of a file system to when its clock was last looked at, and how far it is ahead of ours."""


def _file_system_time(folder: Path) -> float:
    """The time that a file touched now would get: clocks of machines differ, the file system has one."""
    try:
        device = folder.stat().st_dev
        looked, ahead = _clocks.get(device, (-CLOCK_SECONDS, 0.0))
        if time.monotonic() - looked >= CLOCK_SECONDS:
            probe = folder / f".{uuid.uuid4().hex}"
            probe.touch()
            ahead = probe.stat().st_mtime - time.time()
            probe.unlink()
            _clocks[device] = (time.monotonic(), ahead)
    except OSError:
        ahead = 0.0
    return time.time() + ahead


def _read_owner(file: Path) -> Owner | None:
    try:
        data = json.loads(file.read_text())
        names = ("start", "host", "space", "token")
        job = str(data.get("job", "")), int(data.get("restarts", 0))
        return Owner(int(data["pid"]), *(str(data[name]) for name in names), *job)
    except (OSError, ValueError, KeyError, TypeError):
        return None
