"""`posttrain list [recipes|stages|models|data|packages|runs]`: what there is to name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.config.catalogue import Entry

SECTIONS = ("recipes", "stages", "models", "data", "packages", "runs")


def command(
    what: Annotated[str | None, typer.Argument(metavar="[recipes|stages|models|data|packages|runs]")] = None,
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder, for runs.")] = Path("outputs"),
    config_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your own recipes and groups, looked at first.")
    ] = None,
) -> None:
    """List recipes, stage types, models, data, packages that add to them, and runs, each with a line about it."""
    from posttrain.config.suggest import nearest
    from posttrain.errors import RecipeError

    if what is not None and what not in SECTIONS:
        guess = nearest(what, SECTIONS)
        fix = f"write posttrain list {guess}" if guess else f"there are {', '.join(SECTIONS)}"
        raise RecipeError(f"`{what}` cannot be listed", fix=fix)
    blocks = []
    for section in SECTIONS if what is None else (what,):
        rows = _rows(section, outputs, config_dir)
        body = rows or ([] if what is None else ["  none"])
        if body:
            blocks.append("\n".join([f"{section}:", *body]))
    typer.echo("\n\n".join(blocks))
    if what is None:
        typer.echo("\nposttrain show NAME tells more about any of them.")


def _rows(section: str, outputs: Path, config_dir: Path | None) -> list[str]:
    if section == "runs":
        return _runs(outputs)
    return _packages() if section == "packages" else _entries(section, config_dir)


def _packages() -> list[str]:
    """Installed packages that add something, with what they add and what is wrong with it."""
    from posttrain.config import plugins, registry

    adds: dict[str, list[str]] = {}
    for plugin in plugins.found():
        what = "" if plugin.group == plugins.CONFIG else f"{plugins.KINDS[plugin.group]} {plugin.name}"
        adds.setdefault(plugin.origin, []).append(what or "recipes and options")
    rows = columns([(origin, ", ".join(dict.fromkeys(things))) for origin, things in sorted(adds.items())])
    wrong = plugins.problems({plugins.STAGES: registry.STAGES})
    return [*rows, *(f"  {line}" for problem in wrong for line in str(problem).splitlines())]


def _entries(section: str, config_dir: Path | None) -> list[str]:
    from posttrain.config import catalogue

    if section == "recipes":
        entries = catalogue.recipes(config_dir)
    elif section == "stages":
        entries = catalogue.stages(config_dir)
    else:
        entries = catalogue.options(section.removesuffix("s"), config_dir)
    return columns([(entry.name, _with_package(entry)) for entry in entries])


def _with_package(entry: Entry) -> str:
    return f"{entry.line} ({entry.package})".lstrip() if entry.package else entry.line


def _runs(outputs: Path) -> list[str]:
    if not (outputs / "runs").is_dir():
        return []
    from datetime import UTC, datetime

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
        created = datetime.fromtimestamp(record["created"], UTC)
        rows.append((run.name, f"{status}, {created:%Y-%m-%d %H:%M} UTC"))
    return columns(rows)


def columns(rows: list[tuple[str, str]]) -> list[str]:
    """Names and lines side by side."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:{width}}  {line}".rstrip() for name, line in rows]
