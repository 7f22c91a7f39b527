"""Builders and rewards of installed packages: settings checked, content in the key, promises held."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from plugin_packages import forget, install, see
from test_data_preference_pairs import bytes_of, context, model  # noqa: F401  (a fixture)

from posttrain.cli import show
from posttrain.config import load_recipe, plugins, validate_mapping
from posttrain.config.recipe import load_resolved
from posttrain.data import foreign
from posttrain.data.config import DataSourceConfig
from posttrain.data.reading import read_card, read_rows
from posttrain.data.stage import DataSource
from posttrain.errors import RecipeError, StageError
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.fingerprint import key_document, key_of
from posttrain.rewards import plugin

STAGE = DataSource()
CODE = """
from pydantic import BaseModel, ConfigDict, Field

from posttrain.data.documents import Document
from posttrain.data.foreign import Builder


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    count: int = Field(8, ge=2, description="Documents.")
    word: str = "word"


class Counting(Builder):
    Config = Settings
    version = "3"
    licence = "CC0"
    rows = "text"
    random = True

    def external(self, cfg):
        return {"weather": "fine"}

    def size(self, cfg):
        return 10 * cfg.count

    def build(self, cfg, ctx):
        ctx.progress(cfg.count, cfg.count, unit="document")
        return [Document(id=str(n), text=f"{cfg.word} {n} {ctx.seed}") for n in range(cfg.count)]


class Wrong(Builder):
    def build(self, cfg, ctx):
        return ["text"]


def near(prompts, completions, rows):
    assert all(row["answer"] and row["task"]["name"] for row in rows)
    return [0.0 if completion else None for completion in completions]


near.version = "7"


def full(prompts, completions, rows):
    return [1.0 for _ in completions]


def short(prompts, completions, rows):
    return [1.0]


def infinite(prompts, completions, rows):
    return [float("inf") for _ in prompts]


def words(prompts, completions, rows):
    return ["good" for _ in prompts]
"""
POINTS = {
    "data:counting": "own_data:Counting",
    "data:wrong": "own_data:Wrong",
    "data:alien": "own_data:near",
    **{f"rewards:{name}": f"own_data:{name}" for name in ("near", "full", "short", "infinite", "words")},
    "rewards:number": "own_data:Builder.version",
}


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    see(monkeypatch, install(tmp_path / "site", "posttrain-own", POINTS, {"own_data.py": CODE}))
    yield
    sys.modules.pop("own_data", None)
    foreign._builder.cache_clear()
    foreign._model.cache_clear()
    plugins._loaded.clear()
    forget()


def data(**fields) -> DataSourceConfig:
    return validate_mapping({"data": {"builder": "counting", **fields}}).stages["data"]


def test_documents_of_a_package_are_planned_built_and_described(tmp_path: Path) -> None:
    cfg = data(settings={"count": 10}, heldout_fraction=0.2)
    metas = STAGE.describe(cfg, {})
    assert metas["train"].extra["rows"] == "text" and metas["train"].extra["bytes"] == 80
    outputs = STAGE.run(StageContext(name="data", config=cfg, work_dir=tmp_path, seed=4))
    rows = [read_rows(path) for path in outputs.values()]
    assert len(rows[0]) + len(rows[1]) == 10 and rows[0][0]["text"].endswith(" 4")
    card = read_card(outputs["train"])
    assert card["licence"] == "CC0" and card["builder"] == "counting"
    assert card["external"]["builder"] == {"package": "posttrain-own", "version": "3", "weather": "fine"}


def test_the_key_holds_settings_version_package_and_seed(monkeypatch) -> None:
    def key(cfg, seed=0):
        return key_of(key_document(STAGE, cfg, seed, {}))

    base = key(data())
    assert base == key(data(settings={"count": 8}))
    assert len({base, key(data(settings={"count": 9})), key(data(), seed=1)}) == 3
    monkeypatch.setattr(type(foreign.builder_of(data())), "version", "4")
    assert base != key(data())


def test_settings_survive_the_resolved_recipe(tmp_path: Path) -> None:
    recipe = validate_mapping({"data": {"builder": "counting", "settings": {"word": "w"}}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_resolved(tmp_path / "recipe.yaml").stages["data"].settings.word == "w"


def test_slips_in_a_packages_settings_are_told_like_all_others(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("defaults:\n  - base\n  - _self_\ndata: {builder: counting}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "r.yaml"), ["data.settings.cuont=3", "data.settings.count=1"])
    fixes = [problem.fix for problem in caught.value.problems]
    assert fixes == ["write data.settings.count=3", "write data.settings.count=8"]
    with pytest.raises(RecipeError, match="write data.builder=counting"):
        load_recipe(str(tmp_path / "r.yaml"), ["data.builder=countng"])
    with pytest.raises(RecipeError, match="and tiny is not one"):
        load_recipe(str(tmp_path / "r.yaml"), ["data.builder=tiny", "data.settings.count=3"])
    with pytest.raises(RecipeError, match="is not a subclass of posttrain.data.foreign.Builder"):
        load_recipe(str(tmp_path / "r.yaml"), ["data.builder=alien"])


def test_a_builder_and_a_reward_are_shown(capsys) -> None:
    show.command("counting")
    text = capsys.readouterr().out
    assert (
        text.startswith("counting (data builder of posttrain-own 1.2)") and "count: a whole number at least 2" in text
    )
    show.command("near")
    assert "near (reward of posttrain-own 1.2)" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="no schema"):
        show.command("near", schema=True)
    with pytest.raises(RecipeError, match="write posttrain show counting"):
        show.command("countin")


def test_a_path_wins_and_the_package_is_left_alone(tmp_path: Path) -> None:
    cfg = data(path=str(tmp_path / "a.jsonl"))
    assert cfg.kind == "files" and not foreign.is_foreign(cfg) and not plugins.in_use()
    assert "settings" not in cfg.key_fields()


def test_what_is_no_document_is_refused(tmp_path: Path) -> None:
    cfg = data(builder="wrong")
    assert STAGE.describe(cfg, {})["train"].rows is None  # no size is said
    with pytest.raises(StageError, match="builder wrong made a str"):
        STAGE.run(StageContext(name="data", config=cfg, work_dir=tmp_path))


def test_a_built_in_builders_key_is_what_it_was() -> None:
    fields = data(builder="preference_pairs").key_fields()
    assert "settings" not in fields and "reward" not in fields["pairs"]


def test_a_reward_is_loaded_and_held_to_its_promise() -> None:
    rows = [{"answer": "1", "task": {"name": "t"}}] * 2
    assert plugin.load("near")(["a", "b"], ["x", ""], rows) == [0.0, None]
    assert plugin.identity("near") == {"name": "near", "package": "posttrain-own", "version": "7"}
    for name, words in (("short", "1 scores for 2 answers"), ("infinite", "gave inf"), ("words", "else than numbers")):
        with pytest.raises(StageError, match=words):
            plugin.load(name)(["a", "b"], ["x", "y"], rows)
    with pytest.raises(ValueError, match="2 prompts, 1 completions"):
        plugin.load("near")(["a", "b"], ["x"], rows)
    with pytest.raises(RecipeError, match="write|near"):
        plugin.load("naer")
    with pytest.raises(RecipeError, match="is not a function"):
        plugin.load("number")


def test_a_reward_scores_preference_pairs(model, tmp_path: Path) -> None:  # noqa: F811
    pairs = {"max_new_tokens": 6, "batch_size": 5, "tries": 1, "reward": "near"}
    ctx = context(tmp_path / "work", model, pairs=pairs)
    assert STAGE.external(ctx.config)["reward"]["version"] == "7"
    STAGE.run(ctx)
    tries = ctx.result["tries"]
    assert tries["wrong"] > 0 and tries["unscored"] == tries["right"] == 0
    with pytest.raises(StageError, match="no training pair: .* questions are 16 right"):
        STAGE.run(context(tmp_path / "full", model, pairs={**pairs, "reward": "full"}))
    with pytest.raises(RecipeError, match="there is no reward `fra`"):
        STAGE.external(context(tmp_path / "other", model, pairs={**pairs, "reward": "fra"}).config)
