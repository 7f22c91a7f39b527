"""`python -m posttrain.methods.export.program FOLDER OUT SETTINGS`: what is behind `posttrain export`, with torch."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from posttrain.errors import EXIT_DONE, PosttrainError, RecipeError
from posttrain.methods.export.config import ExportConfig
from posttrain.models.finite import check_numbers
from posttrain.models.inspect import check_model_folder


def in_options(text: str) -> str:
    """An error's words with a stage's settings as the options of the command."""
    text = re.sub(r"\b(to|loader)=(\w+)", r"--\1 \2", text)
    return text.replace("pad_ranks=true", "--pad-ranks")


def main(arguments: list[str]) -> int:
    """Export; the exit code."""
    source, target, settings = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    made = not target.exists()
    try:
        check_model_folder(source)
        check_numbers(source, source)
        from posttrain.methods.export.certificate import write_certificate, write_readme
        from posttrain.methods.export.write import export_model

        _make(target)
        certificate = export_model(source, target, ExportConfig(**settings))
        write_certificate(target, certificate)
        write_readme(source, target, certificate)
    except PosttrainError as error:
        if made and target.is_dir():
            target.rmdir()
        print(f"posttrain: {in_options(str(error))}", file=sys.stderr)
        return error.exit_code
    for step in certificate["steps"]:
        print(f"{step['name']}: relative logit error {step['relative']:.1e}", file=sys.stderr)
    print(f"servers: {certificate['servers']}", file=sys.stderr)
    print(target)
    return EXIT_DONE


def _make(target: Path) -> None:
    """The folder to write. Raises RecipeError where there can be none."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        what = f"{target} cannot be written: {error.strerror}"
        raise RecipeError(what, "--out", "give a folder that you may write: --out DIR") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
