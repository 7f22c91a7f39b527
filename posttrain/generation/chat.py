"""`python -m posttrain.generation.chat FOLDER`: the program behind `posttrain chat`, in a process that has torch."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import EXIT_DONE, EXIT_INTERRUPTED, PosttrainError, RecipeError
from posttrain.pipeline.visible import visible

# torch comes with these: it is imported in `main`, where a Ctrl-C during the seconds that it takes ends in one line.
if TYPE_CHECKING:
    from posttrain.generation.answers import Conversation
    from posttrain.generation.settings import Sampling

HELP = "/reset forgets the conversation, /exit ends it; Ctrl-C cuts an answer short"


def main(arguments: list[str] | None = None) -> int:
    """Chat with the model of a folder; the exit code."""
    options = _parse(arguments)
    _replace_what_is_no_text()
    try:
        sampling = _sampling(options)
        conversation = _open(options.folder)
        if options.prompt is None:
            return converse(conversation, sampling)
        # An argument that is not UTF-8 comes as lone surrogates, which no tokenizer takes.
        prompt = options.prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        conversation.ask(prompt, sampling, _write)
        print(flush=True)
        return EXIT_DONE
    except PosttrainError as error:
        print(f"posttrain: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`posttrain chat … | head`). What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def converse(conversation: Conversation, sampling: Sampling) -> int:
    """Read turns from stdin until it ends; the exit code."""
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
        if not getattr(conversation.tokenizer, "chat_template", None):
            print("this model has no chat template: it continues the text", file=sys.stderr)
    while True:
        try:
            text = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return EXIT_DONE
        if text.strip() == "/exit":
            return EXIT_DONE
        if text.strip() == "/reset":
            conversation.reset()
            continue
        if text.strip():
            _answer(conversation, text, sampling)


def _answer(conversation: Conversation, text: str, sampling: Sampling) -> None:
    forgotten = conversation.forgotten
    try:
        conversation.ask(text, sampling, _write)
        print(flush=True)
    except PosttrainError as error:
        print(f"posttrain: {error}", file=sys.stderr)
    if conversation.forgotten > forgotten:
        said = "the conversation outgrew the cache: its oldest turns were forgotten"
        print(f"posttrain: {said}", file=sys.stderr)


def _sampling(options: argparse.Namespace) -> Sampling:
    from pydantic import ValidationError

    from posttrain.generation.settings import Sampling

    fields = ("max_new_tokens", "temperature", "top_p", "seed")
    try:
        return Sampling(**{name: getattr(options, name) for name in fields})
    except ValidationError as error:
        first = error.errors()[0]
        where = "--" + str(first["loc"][0]).replace("_", "-")
        why = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{where} {first['input']} is refused: {why}", where) from None


def _replace_what_is_no_text() -> None:
    """Bytes that are not text, and characters that the terminal does not have, are shown as marks: no traceback."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _open(folder: Path) -> Conversation:
    import torch
    from transformers.utils import logging

    from posttrain.generation.answers import Conversation
    from posttrain.models.loading import load_model, load_tokenizer

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    # A CPU is slow in half precision; a GPU answers in the type that the model was saved in.
    model = load_model(folder, device="cuda" if cuda else "cpu", dtype="auto" if cuda else torch.float32)
    return Conversation(model, load_tokenizer(folder))


def _write(piece: str) -> None:
    print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m posttrain.generation.chat", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt")
    # Defaults are those of `posttrain chat`, which always says everything.
    parser.add_argument("--max-new-tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--top-p", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
