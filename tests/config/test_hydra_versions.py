"""What `make test-hydra-next` compares, and that it can fail."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("composed", ROOT / "scripts" / "composed.py")
composed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(composed)


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_the_small_environment_differs_from_the_great_one_in_hydra_alone() -> None:
    here, there = pinned("constraints.txt"), pinned("constraints-hydra-next.txt")
    other = {name for name, version in there.items() if here.get(name) != version}
    assert other == {"hydra-core", "omegaconf"} and "torch" not in there
    assert there["hydra-core"].startswith("1.4")


def test_another_result_is_told_and_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    case = ("transmla", ["scale=smoke"])
    monkeypatch.setattr(composed, "cases", lambda: iter([case]))
    file = tmp_path / "composed.json"
    assert composed.main(["--out", str(file)]) == 0
    assert composed.main(["--same-as", str(file)]) == 0
    other = json.loads(file.read_text())
    del other["cases"]["transmla scale=smoke"]["stages"]["train"]["lr"]
    other["cases"]["transmla scale=smoke"]["seed"] = "0"
    file.write_text(json.dumps(other))
    capsys.readouterr()
    assert composed.main(["--same-as", str(file)]) == 1
    said = capsys.readouterr().out
    assert "2 differences" in said and 'transmla scale=smoke.stages.train.lr: "(absent)" there, 0.001 here' in said
    assert 'transmla scale=smoke.seed: "0" there, 0 here' in said


def test_every_recipe_scale_and_option_is_among_the_cases() -> None:
    said = {" ".join([recipe, *overrides]) for recipe, overrides in composed.cases()}
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert {recipe.stem, *(f"{recipe.stem} scale={scale}" for scale in ("smoke", "demo", "gpu1"))} <= said
        for option in (ROOT / "conf").glob("*/*.yaml"):
            group = option.parent.name.replace("stage", "stage@stages.evaluate")
            assert any(case.startswith(f"{recipe.stem} ") and f"{group}={option.stem}" in case.split() for case in said)
