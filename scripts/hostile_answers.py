"""Scores answers that attack their scorer, and says what became of them: nothing may hang, and nothing get out.

    python scripts/hostile_answers.py --count 1000 --seconds 10 --workers 2

A program that succeeds in what it tries prints ESCAPED, which is what its test waits for: a score of 1 is an escape. So
are a changed or a new file beside the canary, and a connection to the socket that listens here.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.rewards.config import AnswerFormat, CodeReward, MathReward
from posttrain.rewards.score import RewardSet, Scores

TESTS = [{"input": "7\n", "output": "ESCAPED"}]
GOLD = "42"
SAID = "this file must stay as it is"

Maker = Callable[[random.Random, Path, int], str]


@dataclass(frozen=True)
class Hostile:
    """One answer: what it tries, which reward scores it, and its text."""

    kind: str
    reward: str
    text: str


def _tried(body: str) -> Maker:
    """A program that prints ESCAPED unless what it does fails. DIR, CANARY, PORT and N are filled in."""
    lines = "\n    ".join(body.splitlines())
    return _plain(f"try:\n    {lines}\n    print('ESCAPED')\nexcept BaseException:\n    pass\n")


def _plain(body: str) -> Maker:
    def make(source: random.Random, folder: Path, port: int) -> str:
        filled = body.replace("CANARY", str(folder / "canary")).replace("DIR", str(folder))
        return filled.replace("PORT", str(port)).replace("NUMBER", str(source.randrange(3, 40)))

    return make


PROGRAMS: dict[str, Maker] = {
    "read passwd": _tried("assert open('/etc/passwd').read()"),
    "read home": _tried("import os\nassert set(os.listdir('/root')) - {'.pyenv'}"),
    "read canary": _tried("assert open('CANARY').read()"),
    "write canary": _tried("open('CANARY', 'a').write('x')"),
    "write beside": _tried("open('DIR/new', 'w').write('x')"),
    "write system": _tried("import sys\nopen(sys.prefix + '/lib/evil.py', 'w')"),
    "symlink": _tried("import os\nos.symlink('CANARY', 'link')\nopen('link', 'a').write('x')"),
    "dot dot": _tried("open('../' * NUMBER + 'CANARY', 'r+').write('x')"),
    "connect": _tried("import socket\nsocket.create_connection(('127.0.0.1', PORT), 0.2)"),
    "connect out": _tried("import socket\nsocket.create_connection(('1.1.1.1', 53), 0.2)"),
    "abstract socket": _tried("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0posttrain-canary-PORT')"),
    "kill parent": _tried("import os\nassert os.getppid()\nos.kill(os.getppid(), 9)"),
    "kill others": _tried("import os\n[os.kill(n, 9) for n in range(2, 500)]"),
    "environment": _tried("import os\nassert any('SECRET' in name or 'KEY' in name for name in os.environ)"),
    "proc": _tried("assert open('/proc/self/environ').read()"),
    "mount": _tried("import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/work', b'tmpfs', 0, None) == 0"),
    "new namespace": _tried("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0"),
    "chroot": _tried("import os\nos.mkdir('x')\nos.chroot('x')"),
    "ptrace": _tried("import ctypes\nassert ctypes.CDLL(None).ptrace(16, NUMBER, None, None) == 0"),
    "descriptors": _tried("import os\nassert os.fstat(3) and os.fstat(4)"),
    "leave early": _plain("import sys\nsys.exit(0)\n"),
    "abort": _plain("import os\nos.abort()\n"),
    "crash": _plain("import ctypes\nctypes.string_at(NUMBER)\n"),
    "memory": _plain("x = bytearray(1 << 33)\n"),
    "memory slowly": _plain("x = []\nwhile True:\n    x.append(bytearray(1 << 24))\n"),
    "big file": _plain("f = open('big', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))\n"),
    "many files": _plain("n = 0\nwhile True:\n    open(str(n), 'w')\n    n += 1\n"),
    "print much": _plain("while True:\n    print('x' * (1 << 20))\n"),
    "bytes": _plain("import os\nos.write(1, bytes(range(256)) * NUMBER)\n"),
    "no program": _plain("\0\ud800 not ( python"),
}  # fmt: skip

SLOW_PROGRAMS: dict[str, Maker] = {
    "deep recursion": _plain("import sys\nsys.setrecursionlimit(10**9)\nf = lambda n: f(n + 1)\nf(0)\n"),
    "loop": _plain("while True:\n    pass\n"),
    "sleep": _plain("import time\ntime.sleep(10**6)\n"),
    "fork bomb": _plain("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"),
    "daemon": _plain("import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.close(1)\ntime.sleep(10**6)\n"),
    "ignore signals": _plain(
        "import signal\nfor n in {*range(1, 32)} - {9, 19}: signal.signal(n, 1)\nwhile True:\n    pass\n"
    ),
    "no output": _plain("import os\nos.close(0)\nos.close(1)\nos.close(2)\nwhile True:\n    pass\n"),
    "regex": _plain("import re\nre.match('(a+)+$', 'a' * 50 + 'b')\n"),
    "power": _plain("print(9 ** 9 ** 9)\n"),
}

COMMANDS = [r"\frac", r"\sqrt", "{", "}", "^", "_", "1", "x", "&", r"\\", r"\left(", r"\int"]
SUM = r"\sum_{k=1}^{100000000} \sin(k)"
FORMULAS: dict[str, Maker] = {
    "import": lambda source, folder, port: f"__import__('os').system('touch {folder}/new')",
    "import in latex": lambda source, folder, port: rf"\text{{__import__('os').system('touch {folder}/new')}}",
    "open": lambda source, folder, port: f"open('{folder}/canary','w').write('x') + 1",
    "attribute": lambda source, folder, port: "().__class__.__bases__[0].__subclasses__()[1] / 2",
    "write18": lambda source, folder, port: rf"\immediate\write18{{touch {folder}/new}}",
    "lambda": lambda source, folder, port: f"(lambda: open('{folder}/new','w'))() + 1",
    "megabyte": lambda source, folder, port: source.choice("1x+$\\") * (1 << 20),
    "digits": lambda source, folder, port: "9" * source.randrange(1000, 9000),
    "zero bytes": lambda source, folder, port: "4\0" * source.randrange(1, 50),
    "unicode": lambda source, folder, port: "".join(chr(source.randrange(0x80, 0xD7FF)) for _ in range(200)),
    "surrogate": lambda source, folder, port: "\ud800" * source.randrange(1, 9),
    "operators": lambda source, folder, port: "".join(source.choice("0123456789+-*/^() ") for _ in range(200)),
    "commands": lambda source, folder, port: "".join(source.choice(COMMANDS) for _ in range(60)),
    "matrix": lambda source, folder, port: r"\begin{pmatrix}" + r"1 & 2 \\ " * 30 + r"\end{pmatrix}",
}  # fmt: skip
SLOW_FORMULAS: dict[str, Maker] = {
    "braces": lambda source, folder, port: "{" * source.randrange(10, 3000),
    "deep": lambda source, folder, port: _nested(r"\frac{1}{1+", "}", source.randrange(20, 40)),
    "brackets": lambda source, folder, port: "(" * source.randrange(10, 120) + "1" + ")" * 80,
    "roots": lambda source, folder, port: _nested(r"\sqrt{1+", "}", source.randrange(5, 25)),
    "tower": lambda source, folder, port: "10^{10^{10^{10}}}",
    "python tower": lambda source, folder, port: "9**9**9**9**9",
    "factorials": lambda source, folder, port: "(((99!)!)!)!",
    "sum": lambda source, folder, port: SUM,
    "power of sum": lambda source, folder, port: "(x+y+z+w)^{2000}",
    "integral": lambda source, folder, port: r"\int_0^1 x^{x^{x^x}} \sin(x^{99}) dx",
}


def _nested(before: str, after: str, depth: int) -> str:
    return before * depth + "1" + after * depth


def answers(count: int, slow_share: float, folder: Path, port: int, seed: int = 0) -> list[Hostile]:
    """`count` answers, half of them programs and half formulas, `slow_share` of them of kinds that may never end."""
    source = random.Random(seed)
    groups = {"code": (PROGRAMS, SLOW_PROGRAMS), "math": (FORMULAS, SLOW_FORMULAS)}
    found = []
    for number in range(count):
        reward = ("code", "math")[number % 2]
        quick, slow = groups[reward]
        makers = slow if source.random() < slow_share else quick
        kind = source.choice(sorted(makers))
        found.append(Hostile(kind, reward, makers[kind](source, folder, port)))
    return found


def score(hostile: list[Hostile], seconds: float, workers: int) -> tuple[Scores, float]:
    """The scores of such answers, and the seconds that they took."""
    rewards = {"code": CodeReward(seconds=seconds, memory_mb=256), "math": MathReward(seconds=seconds)}
    rows = [{"tests": TESTS} if answer.reward == "code" else {"answer": GOLD} for answer in hostile]
    texts = [answer.text for answer in hostile]
    with RewardSet(rewards, AnswerFormat(find="whole"), workers=workers, memory_mb=2048) as scorer:
        scorer.warm()
        began = time.monotonic()
        scores = scorer.score([""] * len(texts), texts, rows, [1] * len(texts))
        return scores, time.monotonic() - began


class Watch:
    """A canary file in a folder of its own and a socket that listens: `broken` says what was touched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "canary").write_text(SAID)
        self.doors = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.port = self.doors[0].getsockname()[1]
        self.doors[1].bind(f"\0posttrain-canary-{self.port}")
        self.doors[1].listen()

    def broken(self) -> list[str]:
        """What is no longer as it was; closes the doors."""
        found = [path.name for path in self.folder.iterdir() if path.name != "canary"]
        if (self.folder / "canary").read_text() != SAID:
            found.append("canary")
        for door in self.doors:
            door.setblocking(False)
            try:
                door.accept()
                found.append("socket")
            except BlockingIOError:
                pass
            door.close()
        return found


def outcomes(hostile: list[Hostile], scores: Scores) -> Counter[tuple[str, str, str]]:
    """How many answers of each reward and kind came to which score."""
    return Counter(
        (answer.reward, answer.kind, {None: "unscored", 0.0: "0", 1.0: "ESCAPED"}.get(found, str(found)))
        for index, answer in enumerate(hostile)
        for found in [scores.by_reward[answer.reward][index]]
    )


def main(arguments: list[str] | None = None) -> int:
    """Score them and print a table; 1 if anything got out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--slow", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder))
        hostile = answers(given.count, given.slow, watch.folder, watch.port, given.seed)
        scores, took = score(hostile, given.seconds, given.workers)
        broken = watch.broken()
    found = outcomes(hostile, scores)
    for (reward, kind, outcome), number in sorted(found.items()):
        print(f"{reward:5} {kind:18} {outcome:9} {number:5}")
    print(f"\n{given.count} answers in {took:.1f} s, {given.workers} workers, {given.seconds} s each; {scores.counts}")
    escapes = sum(number for (_, _, outcome), number in found.items() if outcome == "ESCAPED")
    print(f"escapes: {escapes}; touched: {', '.join(broken) or 'nothing'}")
    return int(bool(escapes or broken))


if __name__ == "__main__":
    sys.exit(main())
