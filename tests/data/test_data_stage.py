"""The data source: precedence, keys, plans, bad files, and what lands in the store."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from posttrain.data.builders import python_text
from posttrain.data.config import DataSourceConfig
from posttrain.data.reading import read_card, read_rows
from posttrain.data.stage import DataSource
from posttrain.errors import RecipeError, StageError
from posttrain.paths import shipped
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.stage import ArtifactMeta

STAGE = DataSource()
OPTIONS = {path.stem: yaml.safe_load(path.read_text()) for path in (shipped("conf") / "data").glob("*.yaml")}
MODEL = ArtifactMeta(type="model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(cfg: DataSourceConfig, work: Path) -> tuple[list[dict], list[dict]]:
    work.mkdir(parents=True, exist_ok=True)
    outputs = STAGE.run(StageContext(name="data", config=cfg, work_dir=work))
    return read_rows(outputs["train"]), read_rows(outputs["heldout"])


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(count: int) -> list[dict]:
    return [{"text": f"document number {i}"} for i in range(count)]


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_option_is_planned_without_anything(name) -> None:
    cfg = DataSourceConfig(**OPTIONS[name])
    metas = STAGE.describe(cfg, {"model": MODEL})
    STAGE.check(cfg, {"model": MODEL})
    assert metas["train"].tokens > 0 and metas["heldout"].tokens > 0
    assert STAGE.estimate(cfg, {"model": MODEL}).data_tokens == metas["train"].tokens
    json.dumps([STAGE.external(cfg), cfg.key_fields()])


def test_path_wins_over_every_option(tmp_path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", texts(10))
    alone = DataSourceConfig(path=str(path))
    for option in (OPTIONS["demo_text"], OPTIONS["tiny"] | {"heldout_fraction": 0.05}):
        cfg = DataSourceConfig(**{**option, "path": str(path)})
        assert (cfg.kind, cfg.heldout_kind, cfg.name) == ("files", "split", "mine.jsonl")
        assert cfg.key_fields() == alone.key_fields()
        assert STAGE.external(cfg) == STAGE.external(alone)


def test_key_counts_content_and_not_the_path(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "x.jsonl", texts(3))
    first, second = (DataSourceConfig(path=str(tmp_path / name / "x.jsonl"), label=name) for name in ("a", "b"))
    assert (first.key_fields(), STAGE.external(first)) == (second.key_fields(), STAGE.external(second))
    jsonl(tmp_path / "b" / "x.jsonl", texts(4))
    assert STAGE.external(first) != STAGE.external(second)


def test_ignored_settings_are_not_in_the_key() -> None:
    tiny = DataSourceConfig(**OPTIONS["tiny"])
    assert tiny.key_fields() == DataSourceConfig(**OPTIONS["tiny"], samples={"num_samples": 7}).key_fields()
    other = DataSourceConfig(**{**OPTIONS["tiny"], "heldout_fraction": 0.3})
    assert tiny.key_fields() != other.key_fields()
    assert STAGE.external(DataSourceConfig(**OPTIONS["demo_text"])).keys() == {"python", "packages", "heldout_files"}


def test_artifacts_and_prediction_agree(tmp_path) -> None:
    path = jsonl(tmp_path / "mine.jsonl", texts(60))
    cfg = DataSourceConfig(path=str(path), heldout_fraction=0.2)
    predicted = STAGE.describe(cfg, {})
    train, heldout = run(cfg, tmp_path / "work")
    assert len(train) + len(heldout) == 60 and heldout
    for name, rows in (("train", train), ("heldout", heldout)):
        folder = tmp_path / "work" / "outputs" / name
        measured = STAGE.measure(name, folder, predicted[name])
        assert (measured.rows, measured.tokens) == (predicted[name].rows, predicted[name].tokens)
        assert measured.rows == len(rows)
        assert measured.extra["sha256"] == read_card(folder)["sha256"]
    again = run(cfg, tmp_path / "again")
    assert again == (train, heldout)


def test_demo_text_holds_out_the_committed_text(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(python_text, "get_paths", lambda: {"stdlib": str(Path(json.__file__).parent)})
    option = OPTIONS["demo_text"] | {"python": {"packages": ["no_such_package"]}}
    train, heldout = run(DataSourceConfig(**option, max_rows=20), tmp_path)
    assert len(train) == 20 and len(heldout) == 37
    card = read_card(tmp_path / "outputs" / "heldout")
    assert card["builder"] == "committed" and "public domain" in card["licence"]
    card = read_card(tmp_path / "outputs" / "train")
    assert card["external"]["packages"] == {"no_such_package": "not installed"}
    option["python"] = option["python"] | {"max_bytes": 100_000}
    limited, _ = run(DataSourceConfig(**option), tmp_path / "limited")
    assert 90_000 < sum(len(row["text"].encode()) for row in limited) <= 100_000
    del option["python"]
    split, own = run(DataSourceConfig(**{**option, "heldout": "split", "heldout_fraction": 0.3}), tmp_path / "split")
    assert len(own) > 10 and not {row["text"] for row in own} & {row["text"] for row in split}


def test_demo_text_is_planned_at_its_limit() -> None:
    cfg = DataSourceConfig(**OPTIONS["demo_text"])
    limit = cfg.python.max_bytes // 4
    # Other versions of the packages may hold less than the limit allows.
    assert limit // 2 < STAGE.describe(cfg, {})["train"].tokens <= limit
    missing = [name for name in cfg.python.packages if find_spec(name.partition(".")[0]) is None]
    assert bool(STAGE.estimate(cfg, {}).notes) == bool(missing)
    alone = DataSourceConfig(**{**OPTIONS["demo_text"], "python": {"packages": ["no_such_package"]}})
    assert STAGE.describe(alone, {})["train"].tokens < cfg.python.max_bytes // 8
    assert "no_such_package" in STAGE.estimate(alone, {}).notes[0]
    assert alone.key_fields() != cfg.key_fields()
    assert "python" not in DataSourceConfig(**OPTIONS["tiny"], python={"max_bytes": 9}).key_fields()


def test_folder_of_files(tmp_path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n\nsecond paragraph")
    (folder / "sub" / "b.md").write_text("# title")
    (folder / "c.jsonl").write_text('{"body": "one"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n')
    (folder / ".hidden.txt").write_text("not this")
    (folder / "table.csv").write_text("nor this")
    (folder / "empty.txt").write_text(" \n")
    train, heldout = run(DataSourceConfig(path=str(folder), text_field="body"), tmp_path / "work")
    assert {row["id"] for row in train + heldout} == {"a.txt", "sub/b.md", "c.jsonl:1", "c.jsonl:3"}


def test_one_long_text_holds_out_its_end(tmp_path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {i}. " + "word " * 200 for i in range(60)))
    cfg = DataSourceConfig(path=str(book), heldout_fraction=0.1)
    train, heldout = run(cfg, tmp_path / "work")
    numbers = [int(row["id"].partition("#")[2]) for row in train + heldout]
    assert numbers == list(range(len(numbers))) and 1 <= len(heldout) < len(train)
    assert "its end is held out" in STAGE.estimate(cfg, {}).notes[0]


def test_heldout_text_of_the_user(tmp_path) -> None:
    path = jsonl(tmp_path / "train.jsonl", texts(5))
    held = jsonl(tmp_path / "held.jsonl", texts(2) + [{"text": "another"}])
    train, heldout = run(DataSourceConfig(path=str(path), heldout_path=str(held)), tmp_path / "work")
    assert len(heldout) == 3
    assert [row["text"] for row in train] == [row["text"] for row in texts(5)[2:]]
    with pytest.raises(RecipeError, match="nothing is left to train on"):
        STAGE.check(DataSourceConfig(path=str(held), heldout_path=str(held)), {})


@pytest.mark.parametrize("paragraphs", [20, 60, 2000])
def test_of_one_text_two_documents_are_held_out_at_least(tmp_path, paragraphs) -> None:
    words = [f"paragraph {number} " + "of some words " * 16 for number in range(paragraphs)]
    (tmp_path / "book.txt").write_text("\n\n".join(words))
    cfg = DataSourceConfig(path=str(tmp_path / "book.txt"))
    train, heldout = run(cfg, tmp_path / "work")
    assert len(heldout) >= 2 and STAGE.describe(cfg, {})["heldout"].rows == len(heldout)
    found = [line for row in (*train, *heldout) for line in row["text"].split("\n\n")]
    assert [line.strip() for line in found] == [line.strip() for line in words], "all of it, in order, its end held out"
    assert len({row["id"] for row in (*train, *heldout)}) == len(train) + len(heldout)
    assert STAGE.external(cfg)["pieces"] == "2"
    given = {**cfg.model_dump(), "heldout_path": str(tmp_path / "book.txt")}
    assert "pieces" not in STAGE.external(DataSourceConfig(**given))


def test_rows_cut_from_one_document_stay_together(tmp_path) -> None:
    rows = [{"text": f"piece {i}", "book": i // 5} for i in range(50)]
    cfg = DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows)), document_field="book", heldout_fraction=0.3)
    train, heldout = run(cfg, tmp_path / "work")
    assert len(train) % 5 == len(heldout) % 5 == 0 and heldout


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({"role": "assistant", "content": None}, "the content of turn 2 is null or absent, not a text"),
        ({"role": "assistant", "content": [{"type": "text", "text": "a"}]}, "the content of turn 2 is a list, not a"),
        ({"role": "tool", "content": "a"}, "turn 2 has the role 'tool'"),
        ("a", "turn 2 is no object"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named(tmp_path, turn, why) -> None:
    rows = [{"text": "a"}, {"messages": [{"role": "user", "content": "q"}, turn]}]
    with pytest.raises(RecipeError) as error:
        STAGE.check(DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows))), {})
    problem = error.value.problems[0]
    assert why in problem.what and "leave out rows" in problem.fix and problem.where.endswith("x.jsonl:2")


def test_a_row_without_turns_is_named(tmp_path) -> None:
    rows = [{"text": "a"}, {"messages": []}]
    with pytest.raises(RecipeError, match="there is no turn in it"):
        STAGE.check(DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", rows))), {})


BAD = {
    "empty": ("x.jsonl", "", "0 different documents found; at least 2"),
    "one line": ("x.jsonl", '{"text": "alone"}\n', "1 different document found; at least 2"),
    "one short text": ("x.txt", "alone", "1 different document found; at least 2"),
    "bad line": ("x.jsonl", '{"text": "a"}\n{"text": \n', "not JSON"),
    "no text": ("x.jsonl", '{"text": "a"}\n{"body": "b"}\n', "fields: body"),
    "not an object": ("x.jsonl", '{"text": "a"}\n[1]\n', "JSON object"),
    "not text": ("x.jsonl", '{"text": "a"}\n{"text": 3}\n', "no text in field 'text'"),
    "suffix": ("x.csv", "a,b", ".csv is not read"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_unusable_file_stops_the_plan(tmp_path, case) -> None:
    name, content, says = BAD[case]
    (tmp_path / name).write_text(content)
    cfg = DataSourceConfig(path=str(tmp_path / name))
    with pytest.raises(RecipeError) as error:
        STAGE.check(cfg, {})
    problem = error.value.problems[0]
    assert says in problem.what and problem.fix and str(tmp_path) in problem.where
    if case in ("bad line", "no text", "not an object", "not text"):
        assert problem.where.endswith("x.jsonl:2")
    with pytest.raises(StageError):
        run(cfg, tmp_path / "work")


def test_missing_and_textless_folders(tmp_path) -> None:
    for path, says in ((tmp_path / "no", "no such file"), (tmp_path, "holds no .jsonl")):
        with pytest.raises(RecipeError, match=says):
            STAGE.check(DataSourceConfig(path=str(path)), {})


def test_latin1_is_named(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xfc"}\n')
    with pytest.raises(RecipeError, match="not UTF-8") as error:
        STAGE.check(DataSourceConfig(path=str(tmp_path / "x.jsonl")), {})
    assert error.value.problems[0].where.endswith(":2")


def test_config_needs_a_source() -> None:
    for fields in ({}, {"builder": "hub"}):
        with pytest.raises(ValidationError, match="builder"):
            DataSourceConfig(**fields)


def test_hub_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    with pytest.raises(StageError) as error:
        run(DataSourceConfig(**OPTIONS["fineweb_edu"]), tmp_path / "work")
    assert "HuggingFaceFW/fineweb-edu" in str(error.value) and "data=demo_text" in str(error.value)


def test_hub_rows_are_streamed_up_to_the_limit(tmp_path, monkeypatch) -> None:
    from posttrain.data.builders import hub

    seen = []

    def stream(cfg):
        for number in range(100):
            seen.append(number)
            yield {"conversations": [{"from": "human", "value": f"q{number}"}, {"from": "gpt", "value": "a"}]}

    monkeypatch.setattr(hub, "_stream", stream)
    option = {**OPTIONS["openhermes"], "hub": {"name": "a/b", "max_rows": 10}, "heldout_fraction": 0.3}
    train, heldout = run(DataSourceConfig(**option), tmp_path)
    assert len(train) + len(heldout) == 10 and len(seen) <= 11
    assert train[0]["messages"][0]["role"] == "user" and train[0]["text"].startswith("User: q")


def test_an_artifact_is_data_too(tmp_path) -> None:
    train, heldout = run(DataSourceConfig(**OPTIONS["tiny"]), tmp_path / "first")
    rows = tmp_path / "first" / "outputs" / "train" / "rows.jsonl"
    again = run(DataSourceConfig(path=str(rows), heldout_fraction=0.15), tmp_path / "second")
    assert sorted(row["id"] for part in again for row in part) == sorted(row["id"] for row in train)
    assert sum("messages" in row for part in again for row in part) == sum("messages" in row for row in train) > 0


def test_text_of_its_own_counts_before_messages(tmp_path) -> None:
    row = {"text": "rendered <s>hi</s>", "messages": [{"role": "user", "content": "hi"}]}
    train, heldout = run(DataSourceConfig(path=str(jsonl(tmp_path / "x.jsonl", [row, *texts(3)]))), tmp_path / "work")
    assert all("messages" not in found for found in train + heldout)


def test_a_hub_revision_that_is_not_pinned_is_noted() -> None:
    hub = OPTIONS["fineweb_edu"]["hub"]
    notes = {}
    for revision in (None, "v1", "a" * 40):
        cfg = DataSourceConfig(builder="hub", hub={**hub, "revision": revision})
        notes[revision] = " ".join(STAGE.estimate(cfg, {}).notes)
    assert "revision main is not pinned: pin data.hub.revision=COMMIT" in notes[None]
    assert "revision v1 is not pinned" in notes["v1"] and "pinned" not in notes["a" * 40]
