"""Looking at a model folder: digests that survive a re-save, and damage that is found before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from source_models import make_source
from transformers import AutoTokenizer
from upcycled_models import make_latent

from posttrain.errors import RecipeError
from posttrain.models import inspect
from posttrain.models.architecture import normalise
from posttrain.models.inspect import (
    chat_template_digest,
    check_model_folder,
    has_tokenizer,
    model_meta,
    read_architecture,
    tensor_names,
    tokenizer_digest,
)
from posttrain.models.tiny import tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_latent()
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_meta_of_a_good_folder(folder: Path) -> None:
    check_model_folder(folder)
    meta = model_meta(folder)
    assert meta.architecture == read_architecture(folder) == normalise(make_latent().config.to_dict())
    assert meta.type == "model"
    assert meta.tokenizer == tokenizer_digest(folder)
    assert meta.chat_template == chat_template_digest(folder)
    assert meta.extra["eos_token_id"] == 257
    assert meta.extra["dtype"] == "float32"
    assert meta.extra["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert "model.layers.1.self_attn.kv_b_proj.weight" in tensor_names(folder)
    json.dumps(meta.to_json())


def test_a_tokenizer_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    os.utime(folder / "tokenizer.json", ns=(10**18, 10**18))
    before = tokenizer_digest(folder)
    monkeypatch.setattr(inspect, "_digest_tokenizer", lambda path: pytest.fail("read again"))
    assert tokenizer_digest(folder) == before


def test_tokenizer_digest_survives_a_resave_and_the_state_of_a_call(folder: Path, tmp_path: Path) -> None:
    before = tokenizer_digest(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path / "again")
    changed = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert changed["padding"] is not None or changed["truncation"] is not None, "the call left no state behind"
    assert tokenizer_digest(tmp_path / "again") == before
    assert chat_template_digest(tmp_path / "again") == chat_template_digest(folder) is not None


def _edit(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["added_tokens"][3].update(content="<|other|>"),
        lambda content: content["model"]["vocab"].update({"use_regex": 1}),
        lambda content: content["model"].update(merges=[["a", "b"]]),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content["model"].update(byte_fallback=True),
    ],
    ids=["special token", "vocabulary", "merges", "normalizer", "pre-tokenizer", "byte fallback"],
)
def test_another_tokenizer_has_another_digest(folder: Path, change) -> None:
    before = tokenizer_digest(folder)
    _edit(folder, change)
    assert tokenizer_digest(folder) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].pop("ignore_merges"),
        lambda content: content.update(version="0.9", padding={"strategy": "BatchLongest"}),
    ],
    ids=["older library", "state"],
)
def test_the_same_tokenizer_written_otherwise_has_the_same_digest(folder: Path, change) -> None:
    before = tokenizer_digest(folder)
    _edit(folder, change)
    assert tokenizer_digest(folder) == before


def test_merges_as_text_and_as_pairs(folder: Path) -> None:
    _edit(folder, lambda content: content["model"].update(merges=[["a", "b"], ["ab", "c"]]))
    pairs = tokenizer_digest(folder)
    _edit(folder, lambda content: content["model"].update(merges=["a b", "ab c"]))
    assert tokenizer_digest(folder) == pairs


def test_an_older_tokenizer_is_there_but_has_no_digest(tmp_path: Path) -> None:
    assert chat_template_digest(tmp_path) is None
    for names in (["vocab.json", "merges.txt"], ["tokenizer.model"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for name in names:
            assert not has_tokenizer(folder)
            (folder / name).write_text("{}")
        assert has_tokenizer(folder) and tokenizer_digest(folder) is None


def test_an_unsupported_folder_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for look in (read_architecture, model_meta, check_model_folder):
        with pytest.raises(RecipeError) as error:
            look(folder)
        assert error.value.problems[0].where == str(folder / "config.json")


def test_a_chat_template_counts_wherever_it_is_kept(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    file = chat_template_digest(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ x }}"}))
    assert chat_template_digest(tmp_path) == file
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "{{ x }}"}]}))
    assert chat_template_digest(tmp_path) == file
    config.write_text(json.dumps({"chat_template": "{{ y }}"}))
    assert chat_template_digest(tmp_path) != file


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("num_hidden_layers", -1, r"num_hidden_layers 1, but the weights have layers 0 to 1"),
        ("num_hidden_layers", 1, r"num_hidden_layers 3, but the weights have layers 0 to 1"),
        ("intermediate_size", 64, r"but model.layers.0.mlp.up_proj.weight is \["),
        ("vocab_size", -1, r"but model.embed_tokens.weight is \["),
    ],
)
def test_weights_of_another_shape_than_config_json(tmp_path: Path, field: str, change: int, words: str) -> None:
    """A plan says so, of the folder that the user gave: it was seen where the first stage loads a copy."""
    make_source("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: config[field] + change}))
    with pytest.raises(RecipeError, match=words) as caught:
        check_model_folder(tmp_path)
    assert caught.value.problems[0].where == str(tmp_path / "config.json")


@pytest.mark.parametrize("missing", [1, 4000])
def test_truncated_weights(folder: Path, missing: int) -> None:
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.truncate(size - missing)
    with pytest.raises(
        RecipeError, match=rf"truncated or damaged: it should have {size} bytes and has {size - missing}"
    ):
        check_model_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\x10\x00", b"\xff" * 8 + b"{}", b"\x04\x00\x00\x00\x00\x00\x00\x00[[]]"])
def test_weights_without_a_header(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(RecipeError, match="header is unreadable"):
        check_model_folder(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"no model.safetensors .*found pytorch_model.bin.*safetensors only"):
        check_model_folder(folder)


def test_shards_are_checked_one_by_one(tmp_path: Path) -> None:
    make_source().save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    check_model_folder(tmp_path)
    kept = shards[1].read_bytes()
    shutil.copy(shards[0], shards[1])
    with pytest.raises(RecipeError, match=r"model-00002.* lacks \d+ tensors that the index promises"):
        check_model_folder(tmp_path)
    shards[1].write_bytes(kept[:-1])
    with pytest.raises(RecipeError, match="model-00002.*truncated"):
        check_model_folder(tmp_path)
    shards[1].unlink()
    with pytest.raises(RecipeError, match="no model-00002"):
        check_model_folder(tmp_path)


def test_missing_folder_and_config(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not exist"):
        check_model_folder(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"no config.json") as error:
        check_model_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="not valid JSON"):
        check_model_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(RecipeError, match="llama, mistral, qwen2, qwen3"):
        check_model_folder(tmp_path)


def test_looking_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys\n"
        "import posttrain, posttrain.models\n"
        "from posttrain.models import architecture, inspect\n"
        f"inspect.check_model_folder({str(folder)!r})\n"
        f"architecture.parameter_count(inspect.model_meta({str(folder)!r}).architecture)\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    import os

    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def test_unaligned_torch_types_are_measured_too(tmp_path: Path) -> None:
    make_source().to(torch.bfloat16).save_pretrained(tmp_path)
    check_model_folder(tmp_path)
    assert model_meta(tmp_path).extra["dtype"] == "bfloat16"
