"""`posttrain chat RUN|MODEL`: talk to what a run made, or to any model folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run (its newest model answers) or the folder of a model.")
    ],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this and exit; otherwise ask, line by line.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Most tokens of an answer.")
    ] = 512,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", metavar="T", min=0.0, help="0 always takes the likeliest token; else 0.0001 to 10000."
        ),
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Draw from the likeliest tokens only.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Equal seeds give equal answers.")] = 0,
    outputs: Annotated[Path, typer.Option("--outputs", metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Chat with a model. /reset forgets the conversation, /exit or the end of input ends it."""
    from posttrain.errors import RecipeError
    from posttrain.launch.local import child_environment

    folder = model_folder(model, outputs)
    if top_p == 0.0:
        raise RecipeError("--top-p 0 leaves no token", "--top-p", "take the likeliest token with --temperature 0")
    arguments = [str(folder), "--max-new-tokens", str(max_new_tokens), "--temperature", str(temperature)]
    arguments += ["--top-p", str(top_p), "--seed", str(seed)]
    if prompt is not None:
        arguments += [f"--prompt={prompt}"]
    sys.stdout.flush()
    sys.stderr.flush()
    # The model needs torch, which this process never imports: another program takes its place, terminal and all.
    program = [sys.executable, "-m", "posttrain.generation.chat", *arguments]
    os.execve(sys.executable, program, child_environment())


def model_folder(name: str, outputs: Path) -> Path:
    """The folder of the model that is meant.

    Raises:
        RecipeError: neither a run nor a model, or a run that has made no model yet.
    """
    from posttrain.errors import RecipeError
    from posttrain.pipeline.run_dir import find_run, list_runs

    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    is_run = (path / "run.json").is_file() or any(run.name.startswith(name) for run in list_runs(outputs))
    if path.is_dir() and not is_run:
        raise RecipeError(f"{name} is no model: it has no config.json", fix="give the folder that holds config.json")
    run = find_run(name, outputs)
    for entry in reversed(run.record()["stages"]):
        artifact = run.artifact(entry["name"])
        made = [output for output, meta in artifact.metas.items() if meta.type == "model"] if artifact else []
        if made:
            typer.echo(f"posttrain: the model of stage {entry['name']} of run {run.name}", err=True)
            return artifact.output(made[-1])
    raise RecipeError(f"run {run.name} has made no model yet", fix=f"let it go on: {run.typed('resume')}")
