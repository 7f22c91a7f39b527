"""Writes the cards of a run, of one artifact, and of a model that was exported out of the store."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.pipeline.files import read_json, write_text
from posttrain.report import card_text
from posttrain.report.card import card_of_unknown, model_card
from posttrain.report.lineage import artifact_folder, run_of_artifact
from posttrain.report.read import Json, RunRecord, StageRecord

FOLDER = "cards"


def models(stage: StageRecord) -> list[str]:
    """Names of a stage's finished outputs that are models."""
    return [folder.name for folder, _ in stage.outputs("model")]


def card_of(run: RunRecord, stage: StageRecord, output: str) -> Json:
    """The card of a finished model of a run."""
    certificates = [folder / "certificate.json" for folder, _ in stage.outputs("certificate")]
    found = next((read_json(path) for path in certificates if path.is_file()), None)
    return model_card(run, stage, output, found)


def card_of_artifact(path: Path) -> Json:
    """The card of an artifact's folder, or of one of its outputs.

    Raises:
        RecipeError: it is no artifact, it holds no model, or a manifest was changed.
    """
    folder = artifact_folder(path)
    if folder is None:
        raise RecipeError(f"{path} is no artifact: it has no manifest.json", fix="give a run, or a folder of the store")
    run, stage = run_of_artifact(folder)
    made = models(stage)
    name = path.expanduser().resolve().name
    if not made or (name != folder.name and name not in made):
        raise RecipeError(f"{path} is no model", fix="give the folder of a stage that makes a model")
    return card_of(run, stage, name if name in made else made[0])


def files(run: RunRecord) -> dict[str, tuple[StageRecord, str]]:
    """Name of every card of a run, without its ending, to the stage and output it is about."""
    found = {}
    for stage in run.stages:
        made = models(stage)
        for output in made:
            found[stage.name if len(made) == 1 else f"{stage.name}.{output}"] = (stage, output)
    return found


def complete(run: RunRecord) -> bool:
    """Whether every card is there."""
    folder = run.folder / FOLDER
    return all((folder / f"{name}{ending}").is_file() for name in files(run) for ending in (".md", ".json"))


def write(run: RunRecord) -> None:
    """Write `cards/STAGE.md` and `.json` for every finished model of a run; cards of others are removed."""
    folder, wanted = run.folder / FOLDER, files(run)
    for stale in folder.glob("*"):
        if stale.suffix in (".md", ".json") and stale.stem not in wanted:
            stale.unlink()
    for name, (stage, output) in wanted.items():
        folder.mkdir(exist_ok=True)
        card = card_of(run, stage, output)
        write_text(folder / f"{name}.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        write_text(folder / f"{name}.md", card_text.render(card))


def exported(source: Path, certificate: Json, licence: str | None = None) -> str:
    """README.md of an export: the card of the model that was exported, with the hub's head and what exporting did.

    Args:
        source: folder of the model; of one that is no artifact nothing is known but `licence`.
    """
    from_store = artifact_folder(source) is not None
    card = card_of_artifact(source) if from_store else card_of_unknown(source.resolve().name, licence)
    digests = (certificate.get("digests") or {}).get("export") or {}
    stock = {"model_type": certificate["to"]} if certificate.get("to") not in (None, "native") else {}
    card["certificate"] = certificate
    card["artifact"] |= {
        **stock,
        "dtype": certificate.get("dtype"),
        "files": {name: {"sha256": sha256, "size": None} for name, sha256 in digests.items()},
    }
    return card_text.hub_head(card) + card_text.render(card)
