"""`posttrain export RUN|MODEL`: write a model for other programs, with a certificate."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run (its newest model) or a model's folder.")],
    to: Annotated[
        Literal["native", "deepseek_v3", "falcon_h1"], typer.Option("--to", help="The layout to write.")
    ] = "native",
    loader: Annotated[
        Literal["transformers", "vllm"], typer.Option("--loader", help="Who will load a deepseek_v3 export.")
    ] = "transformers",
    pad_ranks: Annotated[bool, typer.Option("--pad-ranks", help="Pad per-layer ranks to the largest.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="A new or empty folder.")] = None,
    outputs: Annotated[Path, typer.Option("--outputs", metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Export a model and prove, in a new process, that its logits are those of the original."""
    import json

    from posttrain.cli.chat import model_folder
    from posttrain.errors import RecipeError
    from posttrain.launch.local import child_environment

    folder = model_folder(model, outputs)
    target = out or Path(f"{folder.resolve().name}-{to}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} is not an empty folder", "--out", "give a folder that does not exist: --out DIR")
    settings = json.dumps({"to": to, "loader": loader, "pad_ranks": pad_ranks})
    sys.stdout.flush()
    sys.stderr.flush()
    # The export needs torch, which this process never imports: another program takes its place.
    program = [sys.executable, "-m", "posttrain.methods.export.program", str(folder), str(target), settings]
    os.execve(sys.executable, program, child_environment())
