"""The model source: precedence, keys, folders that are not models, and what lands in the store."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from posttrain.errors import RecipeError, StageError
from posttrain.models.config import ModelSourceConfig
from posttrain.models.sources import hub
from posttrain.models.sources.files import model_files, place
from posttrain.models.stage import ModelSource
from posttrain.models.tiny import write_random_model
from posttrain.paths import shipped
from posttrain.pipeline.context import StageContext

STAGE = ModelSource()
TINY = yaml.safe_load((shipped("conf") / "model" / "tiny.yaml").read_text())
PACKAGE = yaml.safe_load((shipped("conf") / "model" / "smollm2_135m.yaml").read_text())
HUB = yaml.safe_load((shipped("conf") / "model" / "llama32_1b.yaml").read_text())


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.fixture
def model(tmp_path) -> Path:
    write_random_model(tmp_path / "mine", TINY["architecture"], 3)
    return tmp_path / "mine"


def run(cfg: ModelSourceConfig, work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    return STAGE.run(StageContext(name="model", config=cfg, work_dir=work))["model"]


def test_path_wins_over_every_option(model) -> None:
    alone = ModelSourceConfig(path=str(model))
    for option in (TINY, PACKAGE, HUB):
        cfg = ModelSourceConfig(**{**option, "path": str(model)})
        assert (cfg.kind, cfg.name) == ("path", "mine")
        assert cfg.key_fields() == alone.key_fields()
        assert STAGE.describe(cfg, {}) == STAGE.describe(alone, {})
        assert STAGE.describe(cfg, {})["model"].architecture["num_hidden_layers"] == 2


def test_path_is_relative_to_the_current_directory(model, monkeypatch) -> None:
    monkeypatch.chdir(model.parent)
    assert ModelSourceConfig(path="./mine").folder == model
    monkeypatch.setenv("HOME", str(model.parent))
    assert ModelSourceConfig(path="~/mine").folder == model


def test_key_counts_content_and_not_the_path(model, tmp_path) -> None:
    copy = tmp_path / "elsewhere"
    place(model_files(model), copy, link=False)
    first, second = ModelSourceConfig(path=str(model)), ModelSourceConfig(path=str(copy))
    assert (first.key_fields(), STAGE.external(first)) == (second.key_fields(), STAGE.external(second))
    (copy / "optimizer.pt").write_bytes(b"not part of the model")
    assert STAGE.external(first) == STAGE.external(second)
    (copy / "generation_config.json").write_text("{}")
    assert STAGE.external(first) != STAGE.external(second)


def test_label_is_not_in_the_key() -> None:
    assert ModelSourceConfig(**TINY).key_fields() == ModelSourceConfig(**{**TINY, "label": "x"}).key_fields()
    assert ModelSourceConfig(**TINY).key_fields() != ModelSourceConfig(**{**TINY, "seed": 1}).key_fields()


@pytest.mark.parametrize(
    "fields, found",
    [({}, "none"), ({"random": True, "hub": "a/b", "architecture": {"x": 1}}, "hub and random")],
)
def test_exactly_one_source(fields, found) -> None:
    with pytest.raises(ValidationError, match=f"found {found}"):
        ModelSourceConfig(**fields)


def test_random_needs_a_shape() -> None:
    with pytest.raises(ValidationError, match="architecture"):
        ModelSourceConfig(random=True)


def test_folder_is_copied_not_linked(model, tmp_path) -> None:
    (model / "optimizer.pt").write_bytes(b"x")
    out = run(ModelSourceConfig(path=str(model)), tmp_path / "work")
    assert {path.name for path in out.iterdir()} == {path.name for path in model.iterdir()} - {"optimizer.pt"}
    assert (out / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_nlink == 1


def test_a_tokenizer_of_more_tokens_than_embeddings_is_refused_by_the_plan(model, tmp_path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    last = {**content["added_tokens"][-1], "id": rows - 1, "content": "<last>"}
    (model / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [*content["added_tokens"], last]}))
    cfg = ModelSourceConfig(path=str(model))
    STAGE.check(cfg, {})  # an id for each embedding, and embeddings without id, are as it should be
    beyond = {**last, "id": rows, "content": "<beyond>"}
    (model / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": [beyond]}))
    with pytest.raises(RecipeError, match=f"ids up to {rows}, the model has embeddings for {rows}") as refused:
        STAGE.check(cfg, {})
    assert "resize_token_embeddings" in str(refused.value)
    with pytest.raises(StageError, match=f"ids up to {rows}"):
        run(cfg, tmp_path / "work")


def test_a_tokenizer_without_tokens_is_refused_by_the_plan(model) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(RecipeError, match="tokenizer.json has no tokens"):
        STAGE.check(ModelSourceConfig(path=str(model)), {})


def test_an_older_tokenizer_of_too_many_tokens_is_refused_once_it_is_converted(tmp_path) -> None:
    model = tmp_path / "old"
    write_random_model(model, {**TINY["architecture"], "model_type": "qwen2"}, 0)
    old_export(model)
    state = load_file(model / "model.safetensors")
    few = {
        name: rows[:100] if name in ("model.embed_tokens.weight", "lm_head.weight") else rows
        for name, rows in state.items()
    }
    save_file(few, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(StageError, match="the model has embeddings for 100"):
        run(ModelSourceConfig(path=str(model)), tmp_path / "work")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_where_they_come_from(model, tmp_path, value) -> None:
    import torch

    state = load_file(model / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16)
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match="model.layers.1.mlp.up_proj.weight") as refused:
        run(ModelSourceConfig(path=str(model)), tmp_path / "work")
    assert refused.value.problems[0].where == str(model / "model.safetensors")


def test_interrupted_attempt_leaves_nothing_behind(model, tmp_path) -> None:
    left = tmp_path / "work" / "outputs" / "model"
    left.mkdir(parents=True)
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    out = run(ModelSourceConfig(path=str(model)), tmp_path / "work")
    assert {path.name for path in out.iterdir()} == {path.name for path in model.iterdir()}


def test_measured_meta_is_of_the_files(tmp_path) -> None:
    cfg = ModelSourceConfig(**TINY)
    predicted = STAGE.describe(cfg, {})["model"]
    out = run(cfg, tmp_path)
    measured = STAGE.measure("model", out, predicted)
    assert measured.architecture == predicted.architecture
    assert measured.tokenizer and measured.chat_template
    assert measured.extra["label"] == "tiny random model" and measured.extra["eos_token_id"] == 257


def old_export(model: Path) -> Path:
    """The folder as older releases of transformers wrote it: vocab.json and merges.txt in place of tokenizer.json."""
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (model / "merges.txt").write_text("#version: 0.2\n")
    (model / "tokenizer.json").unlink()
    return model


def test_older_tokenizer_is_converted_and_its_digest_measured(tmp_path) -> None:
    folder = tmp_path / "old"
    write_random_model(folder, {**TINY["architecture"], "model_type": "qwen2"}, 0)
    before = STAGE.external(ModelSourceConfig(path=str(folder)))
    assert "tokenizer" not in before
    cfg = ModelSourceConfig(path=str(old_export(folder)))
    STAGE.check(cfg, {})
    assert "tokenizer" in STAGE.external(cfg)
    predicted = STAGE.describe(cfg, {})["model"]
    out = run(cfg, tmp_path / "work")
    assert predicted.tokenizer is None
    assert (out / "tokenizer.json").is_file() and not (folder / "tokenizer.json").exists()
    assert STAGE.measure("model", out, predicted).tokenizer
    assert [path.name for path in out.parent.iterdir()] == ["model"], "scratch files stay behind"


def test_converting_a_tokenizer_leaves_the_hub_cache_alone(tmp_path, monkeypatch) -> None:
    snapshot = old_export(hub_snapshot(tmp_path, "me/small", monkeypatch))
    (snapshot / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}')
    before = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: snapshot)
    out = run(ModelSourceConfig(hub="me/small"), tmp_path / "work")
    assert (out / "tokenizer.json").is_file()
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == before


def test_a_folder_whose_tokenizer_is_missing_or_cannot_be_read_stops_the_plan(model, monkeypatch) -> None:
    (model / "tokenizer.json").unlink()
    cfg = ModelSourceConfig(path=str(model))
    with pytest.raises(RecipeError, match="no tokenizer") as error:
        STAGE.check(cfg, {})
    (problem,) = error.value.problems
    assert str(model) in problem.what and "tokenizer.json" in problem.fix
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="takes the package sentencepiece"):
        STAGE.check(cfg, {})


def test_a_tokenizer_that_cannot_be_converted_names_the_folder_it_came_from(model, tmp_path) -> None:
    old_export(model)
    (model / "vocab.json").write_text("{")
    with pytest.raises(StageError, match="no tokenizer can be loaded") as error:
        run(ModelSourceConfig(path=str(model)), tmp_path / "work")
    assert error.value.problems[0].where == str(model)


def bad_folder(kind: str, model: Path) -> Path:
    if kind == "missing":
        return model / "nowhere"
    if kind == "file":
        return model / "config.json"
    if kind == "no config":
        (model / "config.json").unlink()
    if kind == "adapter":
        (model / "config.json").rename(model / "adapter_config.json")
    if kind == "truncated":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "unsupported":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    if kind == "pickled":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return model


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "no such folder"),
        ("file", "is a file"),
        ("no config", "config.json"),
        ("adapter", "LoRA adapter"),
        ("truncated", "truncated"),
        ("unsupported", "llama, mistral, qwen2, qwen3"),
        ("pickled", "safetensors only"),
    ],
)
def test_folder_that_is_no_model_stops_the_plan(model, kind, says) -> None:
    cfg = ModelSourceConfig(path=str(bad_folder(kind, model)))
    for ask in (STAGE.check, STAGE.describe):
        with pytest.raises(RecipeError, match=says) as error:
            ask(cfg, {})
        assert error.value.problems[0].where


def test_architecture_that_the_model_contradicts(tmp_path, monkeypatch) -> None:
    snapshot = hub_snapshot(tmp_path, "me/small", monkeypatch)
    cfg = ModelSourceConfig(hub="me/small", architecture={**TINY["architecture"], "num_hidden_layers": 3})
    with pytest.raises(RecipeError, match="num_hidden_layers is 2, not 3"):
        STAGE.check(cfg, {})
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: snapshot)
    with pytest.raises(StageError, match="num_hidden_layers is 2, not 3"):
        run(cfg, tmp_path / "work")


def test_hub_model_without_a_shape_uses_the_local_hub_cache(tmp_path, monkeypatch) -> None:
    cfg = ModelSourceConfig(hub="me/small")
    with pytest.raises(RecipeError, match="shape of me/small is not known"):
        STAGE.check(cfg, {})
    hub_snapshot(tmp_path, "me/small", monkeypatch)
    STAGE.check(cfg, {})
    assert STAGE.describe(cfg, {})["model"].architecture["hidden_size"] == 64
    (note,) = STAGE.estimate(cfg, {}).notes
    assert "revision main is not pinned" in note and "model.revision=COMMIT" in note
    assert STAGE.estimate(ModelSourceConfig(hub="me/small", revision="a" * 40), {}).notes == ()


def test_hub_that_cannot_be_reached_says_what_to_do(tmp_path, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StageError) as error:
        run(ModelSourceConfig(**HUB), tmp_path / "work")
    assert "meta-llama/Llama-3.2-1B-Instruct" in str(error.value)
    assert "HF_HUB_OFFLINE is set" in str(error.value) and "model.path=" in str(error.value)


def hub_snapshot(tmp_path: Path, name: str, monkeypatch) -> Path:
    """A hub cache that holds a tiny model under that name."""
    repository = tmp_path / "cache_of_hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    write_random_model(snapshot, TINY["architecture"], 0)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache_of_hub"))
    return snapshot


def test_stage_modules_import_no_torch() -> None:
    import subprocess

    code = "import sys, posttrain.models.stage, posttrain.data.stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
