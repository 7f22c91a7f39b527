"""Read and write model folders. Weights are safetensors; what was written is read back and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import StageError
from posttrain.models.foreign import register_all, register_for
from posttrain.models.inspect import TOKENIZER, check_model_folder, model_meta
from posttrain.pipeline.files import sync_file, sync_folder

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def load(path_or_name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of an artifact folder or a hub name, ready to generate.

    The model is in evaluation mode, in the type its folder says, on the GPU if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(path_or_name).expanduser().is_dir():
        folder = Path(path_or_name).expanduser()
        return load_model(folder, device=device, dtype="auto"), load_tokenizer(folder)
    register_all()
    model = AutoModelForCausalLM.from_pretrained(str(path_or_name), dtype="auto").to(device).eval()
    return model, AutoTokenizer.from_pretrained(str(path_or_name))


def load_model(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The model of a folder in evaluation mode; `dtype="auto"` keeps the type it was saved in.

    Raises:
        RecipeError: the folder is not a complete model of a supported family.
        StageError: its tensors are not those of its architecture (transformers would fill the gap with random ones).
    """
    check_model_folder(folder)
    register_for(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        ignore_mismatched_sizes=True,  # else transformers raises before it says which; refused below
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    # Old checkpoints carry rotary buffers that no class reads any more.
    extra = [name for name in info.get("unexpected_keys", ()) if not name.endswith("rotary_emb.inv_freq")]
    if extra:
        wrong["unexpected_keys"] = sorted(extra)
    if wrong:
        said = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
        raise StageError(
            f"the weights do not fit the architecture in config.json ({said})",
            where=str(folder),
            fix="save the model again with its own config.json",
        )
    return model.to(device).eval()


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """The type a folder's weights are stored in, which a conversion does not change; None: it does not say."""
    name = model_meta(Path(folder)).extra.get("dtype")
    return getattr(torch, str(name).removeprefix("torch.")) if name else None


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. Raises StageError if there is none."""
    register_for(folder)  # some tokenizers are found by their model's type
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise StageError(
            f"no tokenizer can be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def write_tokenizer_json(folder: str | Path) -> None:
    """Convert the older tokenizer of a folder: `tokenizer.json` and the configuration beside it are written.

    Names are replaced, not contents: files that are hard links into a cache stay as they are there.

    Raises:
        StageError: the tokenizer cannot be loaded, or it has no such form.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer.save_pretrained(scratch)
        if not (scratch / TOKENIZER).is_file():
            raise StageError(f"{type(tokenizer).__name__} cannot be saved as {TOKENIZER}", where=str(folder))
        _flush(scratch)
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == TOKENIZER):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    tokenizer_from: str | Path | None = None,
) -> Path:
    """Write model and tokenizer to a folder; weights in `dtype` (null: as they are). Returns the folder.

    `tokenizer_from` is the folder that the tokenizer was loaded from: its `tokenizer.json` is copied byte for byte,
    since some classes of transformers (Qwen2's) put their own rules in place of those they read.

    Everything is written beside the folder, flushed to disk, read back and compared; then the files move in one by one,
    config.json last. Weight files that a former save left there are removed; other files stay.

    Raises:
        StageError: the disk gave back something else than was written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        state = _cast(model, model.state_dict(), dtype)
        model.save_pretrained(scratch, state_dict=dict(state), max_shard_size=max_shard_size)
        _compare(scratch, state, model)
        _finish(scratch, folder, tokenizer, dtype, tokenizer_from)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def save_by_shards(
    model: PreTrainedModel,
    shards: Iterable[Mapping[str, torch.Tensor]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    tokenizer_from: str | Path | None = None,
) -> Path:
    """`save_model` of a model that is never whole in memory: `model` is its skeleton, every shard becomes a file.

    Raises:
        StageError: the disk gave back something else than was written, or the shards are not the whole model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(scratch, state_dict={})  # all but the weights; it would remove those of a former save
        files: list[tuple[Path, list[str]]] = []
        size = 0
        for shard in shards:
            state = {name: tensor.contiguous().cpu() for name, tensor in _cast(model, dict(shard), dtype).items()}
            file = scratch / f"part-{len(files)}.safetensors"
            save_file(state, file, metadata={"format": "pt"})
            _compare_file(file, state)
            files.append((file, list(state)))
            size += sum(tensor.nbytes for tensor in state.values())
        weights = {}
        for place, (file, names) in enumerate(files, start=1):
            final = f"model-{place:05d}-of-{len(files):05d}.safetensors"
            file.rename(scratch / final)
            weights |= dict.fromkeys(names, final)
        if absent := set(model.state_dict()) - weights.keys() - set(model.all_tied_weights_keys):
            raise StageError(f"{len(absent)} tensors were not written, e.g. {min(absent)}", where=str(scratch))
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _finish(scratch, folder, tokenizer, dtype, tokenizer_from)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _finish(
    scratch: Path,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    tokenizer_from: str | Path | None,
) -> None:
    """Data type and tokenizer beside checked weights, to disk, into place."""
    if dtype is not None:
        _write_dtype(scratch / "config.json", dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
        if tokenizer_from is not None and (Path(tokenizer_from) / TOKENIZER).is_file():
            shutil.copyfile(Path(tokenizer_from) / TOKENIZER, scratch / TOKENIZER)
    _flush(scratch)
    _move_in(scratch, folder)


def _cast(model: PreTrainedModel, state: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Tensors of the model in `dtype`, but for those that its class keeps in fp32."""
    if dtype is None:
        return state
    names = {*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    kept = re.compile("|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in names)) if names else None
    # Tied weights are one tensor under two names; they must stay one, or both would be written.
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not (kept and kept.search(name)):
            key = (tensor.data_ptr(), tensor.shape)
            if key not in cast:
                cast[key] = tensor.to(dtype)
            state[name] = cast[key]
    return state


def _write_dtype(config: Path, dtype: torch.dtype) -> None:
    content = json.loads(config.read_text(encoding="utf-8"))
    content["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _compare(folder: Path, state: dict[str, torch.Tensor], model: PreTrainedModel) -> None:
    """Every tensor on disk is bit for bit the one in memory, and none but the tied ones is absent."""
    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        seen |= _compare_file(file, state)
    absent = set(state) - seen - set(model.all_tied_weights_keys)
    if absent:
        raise StageError(f"{len(absent)} tensors were not written, e.g. {min(absent)}", where=str(folder))


def _compare_file(file: Path, state: Mapping[str, torch.Tensor]) -> set[str]:
    """The names in a file; every tensor must be bit for bit the one in memory."""
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        for name in names:
            if name not in state or not _equal(tensors.get_tensor(name), state[name]):
                raise StageError(f"{name} was not written as it is in memory", where=str(file), fix="check the disk")
    return names


def _equal(written: torch.Tensor, wanted: torch.Tensor) -> bool:
    wanted = wanted.detach().to("cpu").contiguous()
    if written.dtype != wanted.dtype or written.shape != wanted.shape:
        return False
    return torch.equal(written.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        (sync_folder if path.is_dir() else sync_file)(path)


def _move_in(scratch: Path, folder: Path) -> None:
    new = {file.name for file in scratch.iterdir()}
    (folder / "config.json").unlink(missing_ok=True)
    for pattern in WEIGHT_FILES:
        for stale in folder.glob(pattern):
            if stale.name not in new:
                stale.unlink()
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == "config.json"):
        if file.is_dir():
            shutil.rmtree(folder / file.name, ignore_errors=True)
        os.replace(file, folder / file.name)
    sync_folder(folder)
