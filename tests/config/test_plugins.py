"""Packages that add to posttrain: found without being imported, refused where two want one name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_packages import forget, install, see, stage_module

from posttrain.cli import list_, show
from posttrain.config import catalogue, load_recipe, plugins, registry, validate_mapping
from posttrain.config.recipe import load_resolved
from posttrain.errors import RecipeError
from posttrain.pipeline.fingerprint import explain, key_document, key_of

BOOM = "raise RuntimeError('imported')\n"


@pytest.fixture(autouse=True)
def _as_before():
    yield
    forget()
    plugins._loaded.clear()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """posttrain-own 1.2: a stage type, its option, a data option and a recipe; importing the top of it fails."""
    files = {
        "own_files/__init__.py": BOOM,
        "own_files/conf/stage/own_stage.yaml": "# Does next to nothing. More here.\ntype: own_stage\n",
        "own_files/conf/data/own_text.yaml": "# Text of the package.\nbuilder: tiny\nlabel: own text\n",
        "own_files/conf/model/own_model.yaml": "# Model of the package.\nhub: a/b\n",
        "own_files/recipes/own_recipe.yaml": "defaults:\n  - base\n  - data: own_text\n"
        "  - stage@stages.one: own_stage\n  - _self_\ndescription: Shows the package.\n",
        "own_code.py": stage_module("own_stage"),
    }
    points = {"stages:own_stage": "own_code:Own", "config:own": "own_files"}
    folder = install(tmp_path / "site", "Posttrain_Own", points, files)
    see(monkeypatch, folder)
    return folder


def test_what_a_package_adds_is_listed_and_nothing_of_it_is_imported(package, capsys) -> None:
    assert "own_stage" in registry.names() and "own_stage" in registry.usable()
    entries = {entry.name: entry for entry in catalogue.everything()}
    for name in ("own_stage", "own_text", "own_model", "own_recipe"):
        assert entries[name].package == "posttrain-own"
    assert entries["own_stage"].line == "Does next to nothing"
    list_.command()
    text = re.sub(r" +", " ", capsys.readouterr().out)  # columns are as wide as the longest name
    assert "own_recipe Shows the package. (posttrain-own)" in text
    assert "posttrain-own 1.2 recipes and options, stage type own_stage" in text
    show.command("own_text")
    assert "Text of the package" in capsys.readouterr().out
    assert not {"own_files", "own_code"} & set(sys.modules) and not plugins.in_use()


def test_a_recipe_of_a_package_composes_and_its_settings_are_checked(package, tmp_path: Path) -> None:
    recipe = load_recipe("own_recipe", ["stages.one.size=5"])
    assert recipe.stages["one"].size == 5 and recipe.stages["data"].label == "own text"
    assert plugins.in_use() == {"posttrain-own": "1.2"}
    with pytest.raises(RecipeError) as caught:
        load_recipe("own_recipe", ["stages.one.siez=5", "data=own_txt"])
    assert [problem.fix for problem in caught.value.problems] == ["write stages.one.size=5", "write data=own_text"]
    with pytest.raises(RecipeError, match="write own_recipe"):
        load_recipe("own_recip")
    with pytest.raises(RecipeError, match="type: own_stage|own_stage"):
        validate_mapping({"stages": {"x": {"type": "own_stag"}}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_resolved(tmp_path / "recipe.yaml").stages["one"].size == 5


def test_the_users_own_folder_comes_before_a_package(package, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "conf" / "data"
    mine.mkdir(parents=True)
    (mine / "own_text.yaml").write_text("# My text.\nbuilder: tiny\nlabel: mine\n")
    recipe = load_recipe("own_recipe", config_dir=tmp_path / "mine")
    assert recipe.stages["data"].label == "mine"
    (entry,) = [entry for entry in catalogue.options("data", tmp_path / "mine") if entry.name == "own_text"]
    assert (entry.line, entry.package) == ("My text", "")


def test_two_packages_with_one_stage_type_are_told_by_name(package, tmp_path: Path, monkeypatch, capsys) -> None:
    see(monkeypatch, install(tmp_path / "two", "posttrain-two", {"stages:own_stage": "nowhere:X"}))
    for use in (lambda: registry.stage("own_stage"), lambda: registry.package_of("own_stage")):
        with pytest.raises(RecipeError, match="several installed packages: posttrain-own 1.2 and posttrain-two 1.2"):
            use()
    with pytest.raises(RecipeError, match="several installed packages") as caught:
        load_recipe("own_recipe")
    assert len(caught.value.problems) == 1
    assert "own_stage" in [entry.name for entry in catalogue.stages()]  # a list still shows it, and says why not
    list_.command("packages")
    assert "pip uninstall posttrain-two" in capsys.readouterr().out


def test_a_package_cannot_take_a_built_in_name(tmp_path: Path, monkeypatch) -> None:
    see(monkeypatch, install(tmp_path / "bad", "posttrain-bad", {"stages:sft": "nowhere:X"}))
    with pytest.raises(RecipeError, match="`sft` is posttrain's own, and the installed package posttrain-bad 1.2"):
        registry.stage("sft")
    assert registry.stage("evaluate").type == "evaluate"


@pytest.mark.parametrize(
    ("options", "recipe"),
    [({"conf/data/own_text.yaml"}, "own_recipe"), ({"recipes/own_recipe.yaml"}, "own_recipe")],
    ids=["option", "recipe"],
)
def test_a_name_in_two_packages_is_an_error_where_it_is_used(package, tmp_path, monkeypatch, options, recipe) -> None:
    files = {f"other/{name}": "# Another.\nbuilder: tiny\n" for name in options}
    folder = install(tmp_path / "two", "posttrain-two", {"config:any": "other"}, {"other/__init__.py": "", **files})
    see(monkeypatch, folder)
    with pytest.raises(RecipeError, match="is in several installed packages: posttrain-two, posttrain-own") as caught:
        load_recipe(recipe)
    assert "--config-dir" in caught.value.problems[0].fix
    load_recipe("x_ecomla", ["scale=smoke"])


def test_a_package_cannot_change_what_a_shipped_recipe_means(tmp_path: Path, monkeypatch) -> None:
    files = {"thief/__init__.py": "", "thief/conf/model/tiny.yaml": "hub: evil/model\n"}
    see(monkeypatch, install(tmp_path / "site", "thief", {"config:thief": "thief"}, files))
    with pytest.raises(RecipeError, match="`model/tiny` is in several installed packages: thief, posttrain"):
        load_recipe("x_ecomla", ["scale=smoke"])
    mine = tmp_path / "model"
    mine.mkdir()
    (mine / "tiny.yaml").write_text("random: true\narchitecture: {model_type: llama}\nlabel: mine\n")
    assert load_recipe("x_ecomla", ["scale=smoke"], config_dir=tmp_path).stages["model"].label == "mine"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (BOOM, "RuntimeError: imported"),
        ("import a_library_that_is_absent\n", "No module named 'a_library_that_is_absent'"),
        ("Other = 1\n", "AttributeError"),
        ("Own = 3\n", "is not a subclass of"),
        (stage_module("another_name"), "calls itself 'another_name'"),
        (stage_module("own_stage").replace("    Config = Config\n", "    Config = dict\n"), "no `Config`"),
    ],
)
def test_a_stage_that_cannot_be_used_is_one_message(tmp_path: Path, monkeypatch, code: str, words: str) -> None:
    site = install(tmp_path / "site", "posttrain-own", {"stages:own_stage": "own_broken:Own"}, {"own_broken.py": code})
    see(monkeypatch, site)
    monkeypatch.delitem(sys.modules, "own_broken", raising=False)
    with pytest.raises(RecipeError) as caught:
        validate_mapping({"stages": {"x": {"type": "own_stage"}, "y": {"type": "evaluat"}}})
    first, second = caught.value.problems
    assert "`own_stage` of the installed package posttrain-own 1.2" in first.what and words in first.what
    assert "own_stage = own_broken:Own" in first.where and "posttrain-own" in first.fix
    assert "evaluate" in second.fix


def test_config_folders_that_are_not_there_are_told_by_list(tmp_path: Path, monkeypatch, capsys) -> None:
    see(monkeypatch, install(tmp_path / "site", "posttrain-gone", {"config:gone": "gone_package.inner"}))
    load_recipe("x_ecomla", ["scale=smoke"])
    list_.command("packages")
    assert "no conf or recipes folder in `gone_package.inner`" in capsys.readouterr().out


def test_two_packages_stages_of_one_name_never_share_a_key(package, tmp_path: Path, monkeypatch) -> None:
    stage = registry.stage("own_stage")
    ours = key_document(stage, stage.Config(), 0, {})
    assert ours["package"] == "posttrain-own"
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(package)])
    forget()
    see(monkeypatch, install(tmp_path / "two", "posttrain-two", {"stages:own_stage": "own_code:Own"}))
    theirs = key_document(stage, stage.Config(), 0, {})
    assert key_of(ours) != key_of(theirs)
    assert explain(ours, theirs) == ["stage type own_stage of posttrain-own → of posttrain-two"]


def test_the_key_of_a_built_in_stage_names_no_package(package) -> None:
    stage = registry.stage("export")
    assert "package" not in key_document(stage, stage.Config(), 0, {})


def test_the_first_place_on_the_path_counts(package, tmp_path: Path, monkeypatch) -> None:
    see(monkeypatch, install(tmp_path / "newer", "posttrain-own", {"stages:newer": "x:Y"}, version="2.0"))
    assert {(plugin.name, plugin.version) for plugin in plugins.found()} == {("newer", "2.0")}


def test_without_packages_nothing_is_parsed(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom posttrain.config import plugins\n"
        "assert plugins.found() == ()\nassert 'importlib.metadata' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
