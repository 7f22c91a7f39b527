"""The errors a user can meet. The command line alone turns them into a message and an exit code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what, where it was written, and what to do about it."""

    what: str
    where: str = ""
    fix: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.fix:
            lines.append(f"  do: {self.fix}")
        return "\n".join(lines)


class PosttrainError(Exception):
    """Base of every error that is reported to a user as one message instead of a traceback."""

    exit_code = 1

    def __init__(
        self, what: str = "", where: str = "", fix: str = "", *, problems: list[Problem] | None = None
    ) -> None:
        self.problems = list(problems) if problems else [Problem(what, where, fix)]
        super().__init__("\n".join(str(problem) for problem in self.problems))


class RecipeError(PosttrainError):
    """The recipe, an override or an input is wrong; nothing has run. Exit code 2."""

    exit_code = 2


class StageError(PosttrainError):
    """A stage could not do its work for a reason we understand (bad data, NaN loss, broken artifact). Exit code 1."""


class DamagedInputs(StageError):
    """Inputs of a stage are not what their manifests say: they can be made again. `inputs`: name to what is wrong."""

    def __init__(self, inputs: dict[str, list[str]]) -> None:
        self.inputs = inputs
        found = "; ".join(f"{name}: {', '.join(lines)}" for name, lines in inputs.items())
        super().__init__(f"inputs are not what was written ({found})", fix="posttrain verify all looks at the others")


class StopRequested(Exception):
    """Raised by a stage after it saved its state because a stop was asked for; the worker exits 75."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(f"stopped at {step}")
        self.step = step


EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED, EXIT_INTERRUPTED = 0, 1, 2, 75, 130


def fail(what: str, where: str = "", fix: str = "") -> NoReturn:
    """Raise a `StageError` of one problem."""
    raise StageError(what, where, fix)
