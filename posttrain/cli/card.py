"""`posttrain card RUN|FOLDER [STAGE]`: the model card of a run's model, or of an artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.run_dir import RunDir


def command(
    name: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run, or the folder of a model in the store.")],
    stage: Annotated[
        str | None, typer.Argument(metavar="[STAGE]", help="Of a run: whose model; the newest when omitted.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write it there, not to the screen.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON.")] = False,
    hub: Annotated[bool, typer.Option("--hub", help="With the head that the Hugging Face hub reads.")] = False,
    outputs: Annotated[Path, typer.Option("--outputs", metavar="DIR", help="The outputs folder.")] = Path("outputs"),
) -> None:
    """Show where a model comes from: sources, data, settings, code, hardware, figures, what differs from the paper."""
    from posttrain.errors import RecipeError
    from posttrain.pipeline.files import write_text
    from posttrain.report import card_text

    card = _card(name, stage, outputs)
    text = json.dumps(card, indent=1, ensure_ascii=False) + "\n" if as_json else card_text.render(card)
    if hub and not as_json:
        text = card_text.hub_head(card) + text
    if out is None:
        typer.echo(text, nl=False)
        return
    if not out.parent.is_dir() or out.is_dir():
        raise RecipeError(f"{out} cannot be written", "--out", "give a file in a folder that exists: --out card.md")
    write_text(out, text)
    typer.echo(str(out))


def _card(name: str, stage: str | None, outputs: Path) -> dict[str, Any]:
    from posttrain.errors import RecipeError
    from posttrain.pipeline.run_dir import find_run
    from posttrain.report.cards import card_of_artifact
    from posttrain.report.lineage import artifact_folder

    path = Path(name).expanduser()
    if path.is_dir() and not (path / "run.json").is_file() and not (outputs / "runs" / name / "run.json").is_file():
        if artifact_folder(path) is None:
            fix = "give a run, or a folder in the store or in the artifacts/ of a run"
            raise RecipeError(f"{name} is no artifact: there is no manifest.json in it or above it", fix=fix)
        if stage is not None:
            raise RecipeError("a folder is of one stage already", stage, f"leave out {stage}")
        return card_of_artifact(path)
    return _of_run(find_run(name, outputs), stage)


def _of_run(run: RunDir, stage: str | None) -> dict[str, Any]:
    from posttrain.errors import RecipeError
    from posttrain.pipeline.graph import nearest
    from posttrain.report import cards
    from posttrain.report.read import read_run

    record = read_run(run.path)
    made = {one.name: one for one in record.stages if cards.models(one)}
    if stage is None and not made:
        fix = f"let it go on: {run.typed('resume')}"
        raise RecipeError(f"run {run.name} has made no model yet", fix=fix)
    name = next(reversed(made)) if stage is None else stage
    if name not in made:
        known = [one.name for one in record.stages]
        near = nearest(name, list(made))
        fix = f"write posttrain card {run.name} {near}" if near else f"stages with a model: {', '.join(made) or 'none'}"
        what = "has made no model in" if name in known else "is no stage of"
        raise RecipeError(f"{name} {what} run {run.name}", fix=fix)
    return cards.card_of(record, made[name], cards.models(made[name])[0])
