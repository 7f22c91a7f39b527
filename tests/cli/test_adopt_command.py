"""`posttrain adopt`: what it tells to type next."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from posttrain.cli import adopt
from posttrain.config import load_recipe
from posttrain.models.tiny import write_random_model
from posttrain.paths import shipped


def test_the_command_to_go_on_with_can_be_typed(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "recipes").mkdir(parents=True)
    (tmp_path / "mine" / "recipes" / "own.yaml").write_text("defaults: [x_ecomla, _self_]\n")
    tiny = yaml.safe_load((shipped("conf") / "model" / "tiny.yaml").read_text())
    write_random_model(tmp_path / "m", tiny["architecture"], 7)
    typed = ["scale=smoke", "description='two words'"]
    adopt.command("own", "model", tmp_path / "m", typed, config_dir=Path("mine"))
    line = capsys.readouterr().out.splitlines()[-1].removeprefix("go on with: ")
    assert shlex.split(line) == ["posttrain", "run", "own", "--config-dir", "mine", *typed]
    assert load_recipe("own", typed, config_dir=Path("mine")).recipe == "own"
