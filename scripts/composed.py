"""Every shipped recipe with every scale and option as it composes, to set one version of Hydra beside another.

    python scripts/composed.py --out composed.json         with one version, then with the other:
    python scripts/composed.py --same-as composed.json     exit code 1, and what differs, when not all is equal

`make test-hydra-next` does this with the version of constraints.txt and the pre-release of constraints-hydra-next.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra

from posttrain import paths
from posttrain.config import load_recipe
from posttrain.config.overrides import PACKAGES

SETTINGS = (
    ["seed=3", "stages.evaluate.prompts=[a,'b c']", "stages.evaluate.prompts.0=d", "run.name=x"],
    [
        "model@models.more=llama32_1b",
        "stage@stages.more=evaluate",
        "stages.more.inputs={model: models.more, data: data.heldout}",
    ],
    ["~stages.evaluate", "scale=demo", "stages.upcycle.kv_ratio=0.25"],
)
"""Overrides of every kind: values, list items, further sources and stages, deletions, beside a scale."""


def cases() -> Iterator[tuple[str, list[str]]]:
    """Recipe and overrides."""
    groups = [group for group in PACKAGES if group != "stage"]
    for path in sorted(paths.shipped("recipes").glob("*.yaml")):
        recipe = path.stem
        yield recipe, []
        for scale in load_recipe(recipe).frame.scales:
            yield recipe, [f"scale={scale}"]
        for group in groups:
            for option in _options(group):
                yield recipe, [f"{group}={option}"]
        for stage in _options("stage"):
            yield recipe, [f"stage@stages.evaluate={stage}"]
        for settings in SETTINGS:
            yield recipe, settings


def composed() -> dict[str, Any]:
    """Case as typed to the resolved recipe, or to the messages of the error it ends in."""
    return {" ".join([recipe, *overrides]): _resolved(recipe, overrides) for recipe, overrides in cases()}


def _resolved(recipe: str, overrides: list[str]) -> Any:
    from posttrain.errors import RecipeError

    try:
        return json.loads(json.dumps(load_recipe(recipe, overrides).document()))
    except RecipeError as error:
        return sorted(map(str, error.problems))


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (paths.shipped("conf") / group).glob("*.yaml"))


def differences(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """One line for every value that is not the same in both."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            where = f"{path}.{key}" if path else key
            yield from differences(ours.get(key, "(absent)"), theirs.get(key, "(absent)"), where)
    elif ours != theirs:
        yield f"{path}: {json.dumps(theirs)} there, {json.dumps(ours)} here"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all there is to FILE")
    parser.add_argument("--same-as", type=Path, metavar="FILE", help="compare with what --out wrote")
    options = parser.parse_args(arguments)
    here = {"hydra": hydra.__version__, "cases": composed()}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(here), encoding="utf-8")
    if not options.same_as:
        return 0
    there = json.loads(options.same_as.read_text(encoding="utf-8"))
    found = list(differences(here["cases"], there["cases"]))
    versions = f"Hydra {there['hydra']} there, {here['hydra']} here"
    print(f"{len(here['cases'])} cases, {versions}: {'all equal' if not found else f'{len(found)} differences'}")
    print("\n".join(found[:40]), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
