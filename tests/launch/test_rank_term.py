"""How a rank ends: by SIGTERM, at once, whatever it is in (with a wish to stop, not at all), and by itself."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.launch.rank import EXIT_TERM

SECONDS = 1.0
RANK = f"""
import hashlib, os, sys, time
from pathlib import Path
from posttrain.launch import rank
rank.STOP_SECONDS = {SECONDS}
rank.listen_for_term(Path(sys.argv[1]))
print("listening", flush=True)
"""
WAITS = 'sys.stdin.read(); print("saved")'
"""Until nobody needs it any more."""
STANDS = 'hashlib.pbkdf2_hmac("sha256", b"x", b"y", 1 << 30)'
"""In an operation of C's that lets other threads run and comes back to Python only after minutes."""
FORKS = """
told, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b".")
    time.sleep(20)
    os._exit(0)
os.read(told, 1)
os.kill(child, 15)
print(os.waitpid(child, 0)[1])
"""


@pytest.fixture
def start(tmp_path: Path):
    """Starts a rank that listens and then does something."""
    started: list[subprocess.Popen[str]] = []

    def begin(then: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RANK + then, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "listening\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("then", [WAITS, STANDS], ids=["in Python", "in C"])
def test_sigterm_ends_a_rank_that_nobody_has_asked_to_stop(start, then: str) -> None:
    process = start(then)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS + 20) == EXIT_TERM == 143
    assert time.monotonic() - began >= SECONDS, "the file STOP may come a little later than the signal"


@pytest.mark.parametrize("after", [False, True])
def test_sigterm_that_comes_with_a_wish_to_stop_leaves_time_to_save(start, tmp_path: Path, after: bool) -> None:
    process = start(WAITS)
    if not after:
        (tmp_path / "STOP").touch()
    process.send_signal(signal.SIGTERM)
    if after:
        time.sleep(SECONDS / 4)
        (tmp_path / "STOP").touch()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(SECONDS + 0.5)
    assert process.communicate()[0] == "saved\n" and process.returncode == 0


def test_a_process_that_a_rank_forks_ends_by_sigterm_as_any_other(start) -> None:
    process = start(FORKS)
    # Not `communicate`: the line may have come with the one before it, and wait in the buffer that it passes by.
    assert process.stdout is not None and process.stdout.read() == f"{int(signal.SIGTERM)}\n"
    assert process.wait(30) == 0


def test_a_rank_that_is_done_ends_before_the_interpreter_is_taken_down() -> None:
    """What waits there has aborted ranks that had stopped in good order."""
    code = """
import atexit, os
from posttrain.launch.rank import leave
class Late:
    def __del__(self, write=os.write):
        write(1, b"too late")
late = Late()
atexit.register(print, "registered")
print("last words")
leave(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "last words\nregistered\n"), done.stderr
