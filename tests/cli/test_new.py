"""`posttrain new stage NAME` and `posttrain init`: what they write, and what they refuse."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from plugin_packages import forget, install, see

from posttrain.cli import init, new
from posttrain.config import load_recipe, plugins
from posttrain.config.documents import load_document
from posttrain.errors import RecipeError
from posttrain.scaffold import write


@pytest.fixture(autouse=True)
def _as_before():
    yield
    forget()
    plugins._loaded.clear()


def test_a_package_is_written_with_its_names_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new.command("stage", "soft_labels", tmp_path)
    assert f"pip install -e {tmp_path}/posttrain-soft-labels" in capsys.readouterr().out
    package = tmp_path / "posttrain-soft-labels"
    project = tomllib.loads((package / "pyproject.toml").read_text())
    assert project["project"]["name"] == "posttrain-soft-labels"
    points = project["project"]["entry-points"]
    assert points["posttrain.stages"] == {"soft_labels": "posttrain_soft_labels.stage:SoftLabels"}
    assert points["posttrain.config"] == {"soft_labels": "posttrain_soft_labels"}
    names = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    inside = ("__init__", "config", "loss", "trainer", "stage")
    assert names == {
        ".gitignore",
        "README.md",
        "docs/soft_labels.md",
        "pyproject.toml",
        "tests/test_soft_labels.py",
        *(f"posttrain_soft_labels/{name}.py" for name in inside),
        "posttrain_soft_labels/conf/stage/soft_labels.yaml",
        "posttrain_soft_labels/recipes/soft_labels_demo.yaml",
    }
    for name in names:
        text = (package / name).read_text()
        assert not re.search(r"@\w+@|NAME\b(?! *(?:`|=))", text.replace("scale=NAME", "").replace("stages.NAME", "")), (
            name
        )
        if name.endswith(".py"):
            ast.parse(text)
    assert not list(tmp_path.glob(".*"))


def test_what_is_written_is_a_stage_that_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new.command("stage", "soft", tmp_path)
    points = {"stages:soft": "posttrain_soft.stage:Soft", "config:soft": "posttrain_soft"}
    see(monkeypatch, tmp_path / "posttrain-soft", install(tmp_path / "site", "posttrain-soft", points))
    for scale in load_document(tmp_path / "posttrain-soft/posttrain_soft/recipes/soft_demo.yaml").data["scales"]:
        assert load_recipe("soft_demo", [f"scale={scale}"]).stages["train"].type == "soft"


@pytest.mark.parametrize(
    ("name", "words", "fix"),
    [
        ("Soft-Labels", "lower-case letters", "write posttrain new stage soft_labels"),
        ("2fast", "lower-case letters", "write posttrain new stage fast"),
        ("a__b", "lower-case letters", "write posttrain new stage a_b"),
        ("ä", "lower-case letters", "write posttrain new stage my_stage"),
        ("class", "no word of Python", "write posttrain new stage class_stage"),
        ("../up", "lower-case letters", "write posttrain new stage up"),
        ("sft", "posttrain has a stage type of that name", "write posttrain new stage my_sft"),
        ("data_source", "posttrain has a stage type of that name", "write posttrain new stage my_data_source"),
        ("model", "posttrain has a section of that name", "write posttrain new stage my_model"),
        ("own_stage", "posttrain-own has a stage type of that name", "write posttrain new stage my_own_stage"),
    ],
)
def test_a_name_that_cannot_be_is_told(name: str, words: str, fix: str, tmp_path: Path, monkeypatch) -> None:
    see(monkeypatch, install(tmp_path / "site", "posttrain-own", {"stages:own_stage": "x:Y"}))
    (tmp_path / "here").mkdir()
    with pytest.raises(RecipeError, match=words) as caught:
        new.command("stage", name, tmp_path / "here")
    assert caught.value.problems[0].fix == fix
    assert not list((tmp_path / "here").iterdir())


def test_nothing_is_overwritten_and_the_folder_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "posttrain-soft").mkdir()
    with pytest.raises(RecipeError, match="exists already"):
        new.command("stage", "soft", tmp_path)
    assert not list((tmp_path / "posttrain-soft").iterdir())
    with pytest.raises(RecipeError, match="is no folder"):
        new.command("stage", "soft", tmp_path / "absent")


def test_a_package_that_cannot_be_finished_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, content: dict[str, str]) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(write, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        new.command("stage", "soft", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    init.command(mine)
    assert "conf/local/" in (mine / ".gitignore").read_text().splitlines()
    for line in (mine / "my_text.jsonl").read_text().splitlines():
        assert json.loads(line)["text"]
    monkeypatch.chdir(mine)
    recipe = load_recipe("mine", ["scale=smoke"], config_dir=Path("."))
    assert recipe.stages["data"].source_path == mine / "my_text.jsonl" and recipe.stages["model"].random
    (mine / "conf" / "local" / "default.yaml").write_text("run: {limit_hours: 12}\n")
    assert load_recipe("mine", [], config_dir=Path(".")).frame.run.limit_hours == 12


def test_init_touches_nothing_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    with pytest.raises(RecipeError, match="has README.md already"):
        init.command(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other.txt"]
    (tmp_path / "README.md").unlink()
    init.command(tmp_path)
    assert (tmp_path / "other.txt").read_text() == "mine"
