"""Programs as answers: tests that decide, and the walls around them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from posttrain.errors import StageError
from posttrain.rewards import jail, sandbox
from posttrain.rewards.code import program_of, score
from posttrain.rewards.config import AnswerFormat, CodeReward
from posttrain.rewards.pool import Job, Pool
from posttrain.rewards.sandbox import Limits, require, run
from posttrain.rewards.score import RewardSet

LIMITS = Limits(seconds=5.0, memory_mb=256, processes=3, output_bytes=10_000)
SETTINGS = CodeReward(seconds=10.0)
TWICE = [{"input": "4\n", "output": "8\n"}, {"input": "5\n", "output": "10"}]


def namespaces_allowed() -> bool:
    """Whether the kernel allows them, asked of another program: a sandbox that is broken must not skip its tests."""
    command = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--mount", "--fork", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not namespaces_allowed(), reason="no user namespaces here")


@pytest.fixture(autouse=True)
def _orphans_stay_in_the_family():
    jail.adopt_orphans()
    yield
    jail._prctl(jail.PR_SET_CHILD_SUBREAPER, 0)


def printed(program: str, stdin: bytes = b"", limits: Limits = LIMITS) -> str:
    done = run(program, stdin, limits, "namespaces")
    assert done.status == "exited", done
    return done.output.decode()


@pytest.mark.parametrize(
    "answer, tests, test_code, wanted",
    [
        ("print(int(input()) * 2)", TWICE, None, 1.0),
        ("Here:\n```python\nprint(int(input()) * 2)\n```\nDone.", TWICE, None, 1.0),
        ("print(8)", TWICE, None, 0.0),
        ("print(int(input()) * 2, '\\n\\n')", TWICE, None, 1.0),
        ("print('', int(input()) * 2)", TWICE, None, 0.0),
        ("print(int(input()) * 2); raise SystemExit(1)", TWICE, None, 0.0),
        ("def f(x): return x + 1", None, "assert f(1) == 2", 1.0),
        ("def f(x): return x + 1\nprint('noise')", None, "assert f(1) == 2", 1.0),
        ("def f(x): return x + 1", None, "assert f(1) == 3", 0.0),
        ("raise SystemExit(0)", None, "assert f(1) == 3", 0.0),
        ("def f(x): return x + 1\nprint(int(input()) * 2)", TWICE[:1], "assert f(1) == 2", 0.0),
        ("not a program", TWICE, None, 0.0),
        ("print('x' * 10**7)", TWICE, None, 0.0),
    ],
)
def test_all_tests_decide(answer, tests, test_code, wanted) -> None:
    assert score(answer, tests, test_code, SETTINGS) == (wanted, "")


@pytest.mark.parametrize("tests", [[], None, ["1"], [{"input": "1"}], 3])
def test_rows_without_tests_cannot_be_scored(tests) -> None:
    assert score("print(1)", tests, None, SETTINGS) == (None, "gold_failures")


def test_the_last_fenced_block_is_the_program() -> None:
    assert program_of("```\na\n```\ntext\n```python\nb\n  c\n```\n") == "b\n  c\n"
    assert program_of("a = 1") == "a = 1" and program_of("```python\nopen") == "```python\nopen"


def test_time_is_for_all_tests_together() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        score("import time\ntime.sleep(0.6)\nprint(input())", TWICE * 10, None, CodeReward(seconds=0.5))
    assert time.monotonic() - began < 5
    slow = "import time\ntime.sleep(0.4)\nprint(int(input()) * 2)"
    with pytest.raises(TimeoutError):
        score(slow, TWICE * 3, None, CodeReward(seconds=1.0))


def test_a_late_program_costs_no_worker() -> None:
    with RewardSet({"code": CodeReward(seconds=0.5)}, AnswerFormat(find="whole"), workers=1) as rewards:
        rewards.warm()
        before = rewards._pool._workers[0].process.pid
        scores = rewards.score([""] * 2, ["while True: pass", "print(8)"], [{"tests": TWICE[:1]}] * 2, [1, 1])
        assert scores.by_reward["code"] == [0.0, 1.0] and scores.counts["timeouts"] == 1
        assert rewards._pool._workers[0].process.pid == before


def test_the_root_holds_python_and_nothing_else() -> None:
    seen = set(printed("import os\nprint(*os.listdir('/'))").split())
    # Where the old root is left, it lies on top of the new one, and this leads into it.
    assert set(printed("import os\nprint(*os.listdir('/..'))").split()) == seen
    python = Path(jail.PYTHON).parts[1]
    assert seen <= {"usr", "lib", "lib64", "bin", "dev", "tmp", "work", python}
    assert printed("import os\nprint(*sorted(os.listdir('/dev')))").split() == ["null", "random", "urandom", "zero"]
    assert printed("import os\nprint(sorted(os.environ))") == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED']\n"
    assert printed("import os\nprint(os.getpid(), os.getppid(), os.getcwd())") == "1 0 /work\n"


CONTROL = {
    "passwd": "open('/etc/passwd').read()",
    "canary": "open({canary!r}).read()",
    "write": "open({canary!r}, 'a').write('x')",
    "link": "import os; os.symlink({canary!r}, {folder!r} + '/link'); open({folder!r} + '/link', 'a').write('x')",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "abstract": "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + 'posttrain-test-{port}')",
    "proc": "open('/proc/self/environ').read()",
    "parent": "import os; os.kill(os.getppid() or 1 << 30, 0)",
}


@pytest.mark.parametrize("attempt", CONTROL)
def test_what_works_outside_does_not_work_inside(attempt, tmp_path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as door, socket.socket(socket.AF_UNIX) as other:
        port = door.getsockname()[1]
        other.bind(f"\0posttrain-test-{port}")
        other.listen()
        names = {"canary": str(canary), "folder": str(tmp_path), "port": port}
        program = f"{CONTROL[attempt].format(**names)}\nprint('done')"
        inside = run(program, b"", LIMITS, "namespaces")
        assert inside.code != 0 and inside.output == b"" and canary.read_text() == "x"
        outside = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
        assert outside.stdout == b"done\n", outside.stderr


SYSTEM_CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.unshare(0x10000000), libc.mount(b"none", b"/work", b"tmpfs", 0, None), libc.chroot(b"/work"))
print(libc.mount(None, b"/usr", None, 4096 | 32, None), libc.umount2(b"/usr", 2), libc.prctl(39, 0, 0, 0, 0))
print(*(libc.prctl(23, capability, 0, 0, 0) for capability in range(30)))
"""


def test_it_has_no_privileges_and_cannot_get_any() -> None:
    assert printed(SYSTEM_CALLS).split() == ["-1", "-1", "-1", "-1", "-1", "1", *["0"] * 30]
    for path in ("/x", "/usr/x", "/dev/x", sys.base_prefix + "/x"):
        assert "Read-only" in printed(f"try: open({path!r}, 'w')\nexcept OSError as error: print(error)"), path
    assert printed("open('/tmp/x', 'w').write('kept'); print(open('/work/x').read())") == "kept\n"
    assert printed("import os; print(os.path.exists('/work/x'))") == "False\n"
    if os.getuid() == 0:
        assert printed("import os; print(os.getuid(), os.getgid(), os.getgroups())") == "1 1 []\n"


@pytest.mark.parametrize(
    "program, wanted",
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 26))", "OSError"),
        ("import _thread, time\nfor _ in range(9): _thread.start_new_thread(time.sleep, (1,))", "RuntimeError"),
        ("import os, time\nfor _ in range(9):\n    if os.fork() == 0: time.sleep(9)", "BlockingIOError"),
        ("x = [open('/dev/null') for _ in range(99)]", "OSError"),
        ("for n in range(2000): open(f'f{n}', 'w').close()", "OSError"),
    ],
)  # fmt: skip
def test_limits(program, wanted) -> None:
    body = "\n".join(f"    {line}" for line in program.splitlines())
    caught = f"try:\n{body}\nexcept BaseException as error:\n    print(type(error).__name__, flush=True)\n"
    assert printed(caught + "import os\nos._exit(0)").split() == [wanted]


def test_processes_of_its_own_work_within_the_limit() -> None:
    program = (
        "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(5)'], capture_output=True).stdout)"
    )
    assert printed(program) == "b'5\\n'\n"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import os\nos.close(1)\nwhile True: pass",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\ntime.sleep(600)",
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, 1)\nwhile True: pass",
    ],
)
def test_a_late_program_is_killed_with_all_its_processes(program) -> None:
    began = time.monotonic()
    assert run(program, b"", Limits(0.5, 256, 3, 1000), "namespaces").status == "timeout"
    assert time.monotonic() - began < 3
    assert not left_over()


def left_over() -> list[int]:
    """Programs among the descendants of this process, orphans included."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * (process.cmdline()[-1:] == [jail.MAIN])
    return found


def lasting() -> list[int]:
    """Those that are still there after half a second."""
    first = left_over()
    time.sleep(0.5)
    return [number for number in left_over() if number in first]


def test_a_daemon_ends_with_the_program_that_started_it() -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('done')"
    assert printed(program) == "done\n" and not left_over()


def test_a_flood_is_cut_and_a_killed_worker_takes_its_program_along() -> None:
    flood = run("while True: print('x' * 1000)", b"", LIMITS, "namespaces")
    assert flood.status == "flood" and len(flood.output) == LIMITS.output_bytes
    pool = Pool(1)
    job = Job("posttrain.rewards.code:score", ("while True: pass", TWICE, None, CodeReward(seconds=60)), 60.0)
    thread = threading.Thread(target=pool.run, args=([job],), daemon=True)
    thread.start()
    until = time.monotonic() + 20
    # The first that is seen may be the one which tries the sandbox out.
    while not (running := lasting()) and time.monotonic() < until:
        pass
    assert running
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    while left_over() and time.monotonic() < until:
        time.sleep(0.05)
    assert not left_over()


def test_without_namespaces_it_refuses_and_says_what_to_do(monkeypatch) -> None:
    require.cache_clear()

    def refused(*_):
        raise OSError(1, "unshare: Operation not permitted")

    monkeypatch.setattr(jail, "enter_namespaces", refused)
    monkeypatch.setattr(sandbox.time, "sleep", lambda _: None)
    with pytest.raises(StageError) as caught:
        run("print(1)", b"", LIMITS, "namespaces")
    require.cache_clear()
    assert "unshare: Operation not permitted" in str(caught.value) and "isolation: rlimits" in str(caught.value)


PLAIN_PYTHON = "/usr/bin/python3"
"""One that user nobody can start."""


@pytest.fixture
def limits_alone(monkeypatch):
    if not os.path.exists(PLAIN_PYTHON):
        pytest.skip("no Python that every user can start")
    monkeypatch.setattr(jail, "PYTHON", os.path.realpath(PLAIN_PYTHON))
    require.cache_clear()
    yield
    require.cache_clear()


def test_limits_alone_have_to_be_asked_for_and_still_end_everything(limits_alone) -> None:
    assert run("print(input())", b"7", LIMITS, "rlimits").output == b"7\n"
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.close(1)\ntime.sleep(600)"
    assert run(program, b"", Limits(0.5, 256, 3, 1000), "rlimits").status == "timeout"
    assert not left_over()
    assert run("x = bytearray(1 << 30)", b"", LIMITS, "rlimits").code == 1
    folder = run("import os\nprint(os.getcwd(), os.getuid(), *os.environ)", b"", LIMITS, "rlimits").output.split()
    assert not Path(folder[0].decode()).exists() and set(folder[2:]) == {b"PATH", b"LANG", b"PYTHONHASHSEED", b"HOME"}
    assert int(folder[1]) == (jail.NOBODY if os.getuid() == 0 else os.getuid())
