"""Runs a Python program that nobody has read, in a sandbox, and gives what it printed."""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil

from posttrain.errors import StageError
from posttrain.rewards import jail
from posttrain.rewards.jail import Ends, Limits

Isolation = Literal["namespaces", "rlimits"]
ATTEMPTS = 3
"""Namespaces can be short for a moment, when many have just ended."""


@dataclass(frozen=True)
class Run:
    """How a program ended and what it had printed by then.

    exited: by itself or by a signal, then `code` is not 0. timeout: killed. flood: killed, it printed too much.
    """

    status: Literal["exited", "timeout", "flood"]
    code: int
    output: bytes


def run(source: str, stdin: bytes, limits: Limits, isolation: Isolation) -> Run:
    """Run a program with that standard input; when this returns, none of its processes is left.

    Call it in a process with one thread, as a pool's worker is: it forks.

    Raises:
        StageError: the sandbox cannot be had here.
    """
    require(isolation)
    return _run(source, stdin, limits, isolation)


@cache
def require(isolation: Isolation) -> None:
    """Whether that isolation can be had in this process, found out once by a program in it. Raises StageError."""
    limits = Limits(seconds=20.0, memory_mb=256, processes=2, output_bytes=64)
    try:
        done = _run("print(6 * 7)", b"", limits, isolation)
        wrong = "" if done.output == b"42\n" else f"a first program ended with {done.code} and {done.output!r}"
    except StageError as error:
        wrong = error.problems[0].what
    if not wrong:
        return
    if isolation == "namespaces":
        fix = (
            "allow unprivileged user namespaces (Linux 5.12 or later; in a container, a seccomp profile that lets "
            "`unshare` and `mount` pass), or, where answers may read what this user reads and use the network, "
            "isolation: rlimits"
        )
    else:
        fix = "Linux, and a Python that other users can start: as root the program runs as user nobody"
    raise StageError(f"answers cannot be run in isolation `{isolation}` here: {wrong}", "isolation", fix)


def _run(source: str, stdin: bytes, limits: Limits, isolation: Isolation) -> Run:
    for attempt in range(ATTEMPTS):
        try:
            return _attempt(source, stdin, limits, isolation)
        except OSError as error:
            if attempt == ATTEMPTS - 1:
                raise StageError(f"a sandbox cannot be set up: {error}", "isolation") from error
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def _attempt(source: str, stdin: bytes, limits: Limits, isolation: Isolation) -> Run:
    """Raises OSError when the sandbox could not be set up."""
    with ExitStack() as stack:
        (output, out), (failure, failed), (said, say), (told, tell) = (os.pipe() for _ in range(4))
        for ours in output, failure, said, tell:
            stack.callback(os.close, ours)
        ends, parent = Ends(out, failed, say, told), os.getpid()
        if isolation == "namespaces":
            child = _fork(failed, lambda: jail.enter_namespaces(source, stdin, limits, ends, parent))
        else:
            jail.adopt_orphans()
            folder = _folder(stack)
            child = _fork(failed, lambda: jail.enter_limits(source, stdin, limits, ends, parent, folder))
        stack.callback(_end, child, said, isolation)
        for theirs in out, failed, say, told:
            os.close(theirs)
        if isolation == "namespaces" and os.read(said, 1):
            _map_user(child)
            os.write(tell, b"m")
        if reason := _all(failure):
            raise OSError(reason.decode(errors="replace"))
        return _watch(child, output, limits)


def _fork(failed: int, become: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            become()
        except BaseException as error:  # noqa: BLE001  (it must not go on as a second worker)
            with suppress(OSError):
                os.write(failed, f"{error}"[:500].encode())
        finally:
            os._exit(1)
    return child


def _map_user(child: int) -> None:
    """Root in there is this user. If that is root, the program itself is user nobody, who owns nothing out here."""
    own, group = os.getuid(), os.getgid()
    proc = Path(f"/proc/{child}")
    if own == 0:
        (proc / "uid_map").write_text(f"0 0 1\n1 {jail.NOBODY} 1\n")
        (proc / "gid_map").write_text(f"0 0 1\n1 {jail.NOBODY} 1\n")
    else:
        (proc / "setgroups").write_text("deny")
        (proc / "uid_map").write_text(f"0 {own} 1\n")
        (proc / "gid_map").write_text(f"0 {group} 1\n")


def _watch(child: int, output: int, limits: Limits) -> Run:
    """Read what the program prints until it ends, is late, or prints too much."""
    until = time.monotonic() + limits.seconds
    found = bytearray()
    handle = os.pidfd_open(child)
    try:
        waiting = [output, handle]
        while handle in waiting:
            left = until - time.monotonic()
            ready = select.select(waiting, [], [], max(0.0, left))[0]
            if not ready:
                return Run("timeout", -1, bytes(found))
            if output in ready:
                part = os.read(output, 65536)
                found += part
                if len(found) > limits.output_bytes:
                    return Run("flood", -1, bytes(found[: limits.output_bytes]))
                if not part:
                    waiting.remove(output)
            elif handle in ready:
                waiting.remove(handle)
    finally:
        os.close(handle)
    info = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signalled = info.si_code != os.CLD_EXITED
    return Run("exited", 128 + info.si_status if signalled else info.si_status, bytes(found))


def _end(child: int, said: int, isolation: Isolation) -> None:
    """Kill what is left of the program and wait for its end."""
    if isolation == "namespaces":
        # The end of process 1 ends all others before its parent, our child, learns of it and ends too.
        if first := os.read(said, 10).strip():
            with suppress(ProcessLookupError):
                os.kill(int(first), signal.SIGKILL)
        else:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _folder(stack: ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="posttrain-answer-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    if os.getuid() == 0:
        os.chown(folder, jail.NOBODY, jail.NOBODY)
    return folder


def _all(descriptor: int) -> bytes:
    """All that will come, until its last writer is gone."""
    found = b""
    while part := os.read(descriptor, 4096):
        found += part
    return found
