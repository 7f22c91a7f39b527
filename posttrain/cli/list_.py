"""`posttrain list [recipes|stages|models|data|runs]`: what there is to name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SECTIONS = ("recipes", "stages", "models", "data", "runs")


def command(
    what: Annotated[str | None, typer.Argument(metavar="[recipes|stages|models|data|runs]")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder, for runs.")] = Path("outputs"),
    config_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own recipes and groups, looked at first.")
    ] = None,
) -> None:
    """List recipes, stage types, models, data and runs, each with a line about it."""
    from posttrain.config.suggest import nearest
    from posttrain.errors import RecipeError

    if what is not None and what not in SECTIONS:
        guess = nearest(what, SECTIONS)
        fix = f"write posttrain list {guess}" if guess else f"there are {', '.join(SECTIONS)}"
        raise RecipeError(f"`{what}` cannot be listed", fix=fix)
    blocks = []
    for section in SECTIONS if what is None else (what,):
        rows = _runs(outputs) if section == "runs" else _entries(section, config_dir)
        body = rows or ([] if what is None else ["  none"])
        if body:
            blocks.append("\n".join([f"{section}:", *body]))
    typer.echo("\n\n".join(blocks))
    if what is None:
        typer.echo("\nposttrain show NAME tells more about any of them.")


def _entries(section: str, config_dir: Path | None) -> list[str]:
    from posttrain.config import catalogue

    if section == "recipes":
        entries = catalogue.recipes(config_dir)
    elif section == "stages":
        entries = catalogue.stages(config_dir)
    else:
        entries = catalogue.options(section.removesuffix("s"), config_dir)
    return columns([(entry.name, entry.line) for entry in entries])


def _runs(outputs: Path) -> list[str]:
    if not (outputs / "runs").is_dir():
        return []
    from posttrain.errors import RecipeError
    from posttrain.pipeline.lock import held
    from posttrain.pipeline.progress import state_of
    from posttrain.pipeline.run_dir import list_runs

    rows = []
    for run in list_runs(outputs):
        try:
            record = run.record()
        except RecipeError as error:
            rows.append((run.name, f"unreadable: {error.problems[0].what}"))
            continue
        state = state_of(run.events(), [stage["name"] for stage in record["stages"]])
        alive = held(run.lock_path)
        status = "running" if alive else "interrupted" if state.status == "running" else state.status
        rows.append((run.name, f"{status}, {record['created']}"))
    return columns(rows)


def columns(rows: list[tuple[str, str]]) -> list[str]:
    """Names and lines side by side."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {line}".rstrip() for name, line in rows]
