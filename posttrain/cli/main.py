"""The `posttrain` command: one module a verb; errors become one message and an exit code here and nowhere else."""

from __future__ import annotations

import errno
import gc
import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from posttrain import __version__
from posttrain.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, PosttrainError, RecipeError

# The first pydantic model looks through every installed distribution for plugins, a tenth of a light command's time.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

COMMANDS = {
    "run": "run",
    "submit": "submit",
    "plan": "plan",
    "status": "status",
    "logs": "logs",
    "resume": "resume",
    "cancel": "cancel",
    "report": "report",
    "card": "card",
    "chat": "chat",
    "export": "export",
    "list": "list_",
    "show": "show",
    "init": "init",
    "new": "new",
    "verify": "verify",
    "clean": "clean",
    "diff": "diff",
    "adopt": "adopt",
}
HIDDEN = {"worker": "worker", "stage-job": "stage_job"}
# typer brings its own copy of click from 0.24 on and uses the real one before; this is the class of either.
UsageError = typer.BadParameter.__bases__[0]

UNUSABLE_PLACE = {errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG}
"""What a badly chosen folder fails with; any other OSError is a fault of ours and keeps its traceback."""

app = typer.Typer(
    name="posttrain",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="One YAML recipe is the whole post-training pipeline.",
    epilog="Exit codes: 0 done, 1 a stage failed, 2 bad input (nothing ran), 75 stopped, resumable, 130 interrupted.",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def register(names: dict[str, str], *, hidden: bool = False) -> None:
    """Add those commands to the app; a command's function is `posttrain.cli.MODULE.command`."""
    for name, module in names.items():
        command = import_module(f"posttrain.cli.{module}").command
        # `~stages.x` and `+scale=x` are ordinary arguments; only real options start with a dash.
        app.command(name, hidden=hidden)(command)


def main() -> None:
    """Run the command line and exit with its code."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    # Importing one module instead of all keeps a single command as quick as it can be; help needs them all.
    every = COMMANDS | HIDDEN
    if asked not in HIDDEN:
        # Imports make many objects and no garbage; looking through them again and again takes a tenth of the time.
        gc.set_threshold(100_000)
    if asked in every:
        register({asked: every[asked]}, hidden=asked in HIDDEN)
    else:
        register(COMMANDS)
    try:
        code = app(standalone_mode=False)
    except PosttrainError as error:
        sys.exit(_report(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(EXIT_INTERRUPTED)
    except UsageError as error:
        error.show()
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        # The reader of our output went away (`posttrain logs | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        what = f"{error.filename} cannot be used: {error.strerror}"
        sys.exit(_report(RecipeError(what, fix="choose another place: paths.outputs=FOLDER")))
    finally:
        if asked not in HIDDEN:
            # Python looks through all objects for cycles once more when it ends, a fifth of a light command's time.
            # A worker has libraries whose own accounts at exit need that look, or they report leaks.
            gc.freeze()
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: PosttrainError) -> int:
    count = len(error.problems)
    if count > 1:
        typer.echo(f"posttrain: {count} problems", err=True)
    for problem in error.problems:
        text = str(problem).replace("\n", "\n  ") if count > 1 else str(problem)
        typer.echo(f"  - {text}" if count > 1 else f"posttrain: {text}", err=True)
    return error.exit_code
