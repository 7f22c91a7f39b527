"""Whether an answer, a Python program, does what its tests ask, run in a sandbox."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.rewards.config import CodeReward
from posttrain.rewards.sandbox import Limits, run

FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


def score(
    answer: str, tests: Sequence[Any] | None, test_code: str | None, settings: CodeReward
) -> tuple[float | None, str]:
    """1 if the program passes all tests, 0 if not, and what it counts as beside that ("": nothing).

    None where the row's tests are no tests.

    Raises:
        TimeoutError: all tests together took longer than the settings' seconds.
        StageError: there is no sandbox here.
    """
    program = program_of(answer)
    cases = _cases(program, tests, test_code)
    if not cases:
        return None, "gold_failures"
    until = time.monotonic() + settings.seconds
    for case in cases:
        done = run(case.source, case.stdin.encode(), _limits(settings, until), settings.isolation)
        if done.status == "timeout":
            raise TimeoutError
        printed = done.output.decode(errors="replace")
        if done.status != "exited" or done.code != 0 or not case.passed(printed):
            return 0.0, ""
    return 1.0, ""


@dataclass(frozen=True)
class Case:
    """One run: `passed` says of what was printed whether it is right."""

    source: str
    stdin: str
    passed: Callable[[str], bool]


def program_of(answer: str) -> str:
    """The program in an answer: its last fenced block, or all of it."""
    blocks = FENCED.findall(answer)
    return blocks[-1] if blocks else answer


def _cases(program: str, tests: Sequence[Any] | None, test_code: str | None) -> list[Case]:
    """The runs; none if there are no tests, or what is there is none."""
    try:
        cases = [_compared(program, str(test["input"]), str(test["output"])) for test in tests or ()]
    except (KeyError, TypeError, IndexError):
        return []
    if test_code is not None:
        # Else a program that ends before its tests would pass them.
        word = secrets.token_hex(16)
        source = f"{program}\n\n{test_code}\n\nprint('\\n{word}')\n"
        cases.append(Case(source, "", lambda printed: printed.rstrip().endswith(word)))
    return cases


def _compared(program: str, stdin: str, wanted: str) -> Case:
    return Case(program, stdin, lambda printed: _lines(printed) == _lines(wanted))


def _limits(settings: CodeReward, until: float) -> Limits:
    left = max(0.05, until - time.monotonic())
    return Limits(left, settings.memory_mb, settings.processes, settings.output_kb << 10)


def _lines(text: str) -> list[str]:
    """Its lines without the white space at their ends, and without blank lines at the end of all."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
