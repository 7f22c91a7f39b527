"""The process that a pool runs functions in: it serves one pool, reports item by item, and dies with its parent."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

from posttrain.errors import PosttrainError

READY = b"ready"


def main() -> None:
    """Serve the pool whose two file descriptors are in the arguments, until it hangs up.

    `worker.py LINE LIFELINE MEMORY_MB NAME…`: the names are of modules, or of functions to call ("module:function"),
    before the first item's time begins.
    """
    line, lifeline, memory_mb, *names = sys.argv[1:]
    die_with_parent(int(lifeline))
    for name in names:
        function_of(name)() if ":" in name else import_module(name)
    limit_memory(int(memory_mb))
    with Connection(int(line)) as connection:
        connection.send_bytes(READY)
        _silence()
        try:
            while True:
                _serve(connection, connection.recv_bytes())
        except (EOFError, OSError):  # the pool is closed
            return


def die_with_parent(lifeline: int) -> None:
    """Have the kernel end this process when the last writer of that pipe is gone, whatever runs here then.

    A thread that waits for it could not: a long match of a regular expression keeps the interpreter to itself. And
    PR_SET_PDEATHSIG would end the process with the thread that started it.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(1)


def limit_memory(megabytes: int) -> None:
    """Limit this process's address space; 0 = no limit."""
    if megabytes:
        import resource

        size = megabytes << 20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


@lru_cache
def function_of(name: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _serve(connection: Connection, chunk: bytes) -> None:
    # JSON on the way back: whatever takes over this process must not choose what its parent unpickles.
    for function, arguments in pickle.loads(chunk):
        connection.send_bytes(_reply(function, arguments))


def _reply(function: str, arguments: tuple[Any, ...]) -> bytes:
    try:
        return json.dumps({"status": "value", "value": function_of(function)(*arguments)}).encode()
    except TimeoutError:
        said: dict[str, Any] = {"status": "timeout"}
    except PosttrainError as error:
        problem = error.problems[0]
        said = {"status": "refused", "value": [problem.what, problem.where, problem.fix]}
    except Exception as error:  # noqa: BLE001  (what foreign code raises on a hostile answer has no common base)
        said = {"status": "error", "message": f"{type(error).__name__}: {error}"[:200]}
    return json.dumps(said).encode()


def _silence() -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)


if __name__ == "__main__":
    main()
