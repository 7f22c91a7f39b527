"""What a model folder holds, read from its JSON and safetensors headers: no weights in memory, no torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.models.architecture import normalise
from posttrain.pipeline.fingerprint import digest_by
from posttrain.pipeline.stage import ArtifactMeta

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
_OLDER_TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.model",))
"""Files in which older exports of the supported families keep their tokenizer."""
_TOKENIZER_DIGEST = "tokenizer-1"
"""Changed when `_digest_tokenizer` would give another digest of the same file."""
_LARGEST_TOKEN = "largest-token-1"
"""Changed when `_largest_token` would give another number of the same file."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_SIZES = {
    "model.embed_tokens.weight": ("vocab_size", "hidden_size"),
    "model.layers.0.mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
}
"""Tensor of every family to the settings that its rows and columns follow."""
_README_HEAD = 16_384
_STATE_OF_LAST_CALL = ("padding", "truncation")
_LIBRARY_DEFAULTS = {
    "use_regex": True,
    "ignore_merges": False,
    "byte_fallback": False,
    "fuse_unk": False,
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
}
"""Fields a newer tokenizers library writes out and an older one left unsaid; they do not distinguish two tokenizers."""


def read_architecture(folder: str | Path) -> dict[str, Any]:
    """The normalised architecture of a model folder.

    Raises:
        RecipeError: no folder, no readable config.json, or an architecture that is not supported.
    """
    return _architecture(Path(folder))[1]


def model_meta(folder: str | Path) -> ArtifactMeta:
    """Everything a plan may know of a model folder. `extra` holds `eos_token_id`, `dtype` and `weight_bytes`."""
    path = Path(folder)
    config, architecture = _architecture(path)
    generation = _optional_json(path / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ArtifactMeta(
        type="model",
        architecture=architecture,
        tokenizer=tokenizer_digest(path),
        chat_template=chat_template_digest(path),
        extra={
            "eos_token_id": eos,
            "dtype": config.get("dtype") or config.get("torch_dtype"),
            "weight_bytes": sum(file.stat().st_size for file in path.glob("*.safetensors")),
        },
    )


def tokenizer_digest(folder: str | Path) -> str | None:
    """SHA-256 of what `tokenizer.json` says, however a library version spells it; None without that file.

    An older tokenizer has no digest: what it does is known once it has been converted. Padding and truncation are state
    of the last call and are left out.
    """
    file = Path(folder) / TOKENIZER
    # Megabytes of JSON, which every plan asks for.
    return digest_by(file, _digest_tokenizer, _TOKENIZER_DIGEST) if file.is_file() else None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder has a tokenizer, in today's form or an older one."""
    path = Path(folder)
    return any(all((path / name).is_file() for name in names) for names in ((TOKENIZER,), *_OLDER_TOKENIZERS))


def needs_sentencepiece(folder: str | Path) -> bool:
    """Whether the tokenizer is a SentencePiece model alone, which is read with a package of that name."""
    path = Path(folder)
    return not (path / TOKENIZER).is_file() and not (path / "vocab.json").is_file()


def check_vocabulary(folder: str | Path) -> None:
    """Compare the tokenizer's ids with the model's embeddings; an older tokenizer is not looked at.

    Raises:
        RecipeError: the tokenizer writes ids that have no embedding, or has no tokens at all.
    """
    path = Path(folder)
    if not (path / TOKENIZER).is_file():
        return
    rows = read_architecture(path).get("vocab_size")
    largest = int(digest_by(path / TOKENIZER, _largest_token, _LARGEST_TOKEN))
    if largest < 0:
        raise RecipeError(f"{TOKENIZER} has no tokens", where=str(path / TOKENIZER), fix="copy the file again")
    if rows is not None and largest >= rows:
        raise RecipeError(
            f"the tokenizer writes ids up to {largest}, the model has embeddings for {rows} (vocab_size)",
            where=str(path),
            fix="copy the tokenizer that belongs to the model, or `model.resize_token_embeddings(len(tokenizer))` of "
            "transformers and save the model again",
        )


def chat_template_digest(folder: str | Path) -> str | None:
    """SHA-256 of the default chat template, wherever it is kept; None if there is none."""
    path = Path(folder)
    if (path / "chat_template.jinja").is_file():
        return _sha((path / "chat_template.jinja").read_text(encoding="utf-8"))
    template = _optional_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    return _sha(template) if template else None


def stated_licence(folder: str | Path | None) -> str | None:
    """The `license` in the head of a model folder's README.md, as the hub's model cards have it; None without one."""
    readme = Path(folder or "") / "README.md"
    if folder is None or not readme.is_file():
        return None
    import yaml

    with readme.open(encoding="utf-8", errors="replace") as file:
        text = "\n" + file.read(_README_HEAD)
    opening, _, rest = text.partition("\n---\n")
    if opening.strip():
        return None
    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return None
    licence = found.get("license_name") or found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) else None


def check_model_folder(folder: str | Path) -> None:
    """Look at config.json and at every safetensors header and size, without reading a weight.

    Raises:
        RecipeError: missing or broken config.json, unsupported architecture, missing, foreign or truncated weights, or
            weights of another depth or width than config.json says.
    """
    architecture = read_architecture(folder)
    shapes = check_weight_files(folder)
    if "counted_as" not in architecture:  # a type of an installed package has names of its own
        _compare_sizes(architecture, shapes, Path(folder) / "config.json")


def check_weight_files(folder: str | Path) -> dict[str, list[int]]:
    """Look at every safetensors header and size of a folder, whatever its architecture; the shape of every tensor.

    Raises:
        RecipeError: missing, foreign or truncated weights.
    """
    shards, shapes = _shards(Path(folder)), {}
    for file, expected in shards.items():
        found = _complete_tensors(file)
        shapes |= found
        missing = expected - set(found)
        if missing:
            raise RecipeError(
                f"{file.name} lacks {len(missing)} tensors that the index promises, e.g. {sorted(missing)[0]}",
                where=str(file),
                fix="copy or download the folder again",
            )
    return shapes


def _compare_sizes(architecture: dict[str, Any], shapes: dict[str, list[int]], config: Path) -> None:
    """Raise RecipeError where the weights have another depth or width than config.json says."""
    layers = {int(found[1]) for name in shapes if (found := _LAYER.match(name))}
    wanted = architecture["num_hidden_layers"]
    wrong = []
    if layers and layers != set(range(wanted)):
        wrong.append(f"num_hidden_layers {wanted}, but the weights have layers {min(layers)} to {max(layers)}")
    for tensor, (rows, columns) in _SIZES.items():
        shape, stated = shapes.get(tensor), [architecture[rows], architecture[columns]]
        if shape is not None and shape != stated:
            wrong.append(f"{rows} {stated[0]} and {columns} {stated[1]}, but {tensor} is {shape}")
    if wrong:
        fix = "copy the config.json that was saved with these weights"
        raise RecipeError(f"the weights are not of the shape in config.json: {'; '.join(wrong)}", str(config), fix)


def tensor_names(folder: str | Path) -> set[str]:
    """Names of all tensors in a model folder, from the headers."""
    return {name for file in _shards(Path(folder)) for name in _complete_tensors(file)}


def _shards(path: Path) -> dict[Path, set[str]]:
    """Weight files with the tensors the index promises in each (none promised without an index)."""
    if (path / INDEX).is_file():
        shards: dict[Path, set[str]] = {}
        for name, file in _read_json(path / INDEX).get("weight_map", {}).items():
            shards.setdefault(path / file, set()).add(name)
    else:
        shards = {path / WEIGHTS: set()}
    for file in shards:
        if not file.is_file():
            foreign = sorted(other.name for other in path.iterdir() if other.suffix in (".bin", ".pt", ".pth", ".gguf"))
            hint = f" (found {', '.join(foreign)})" if foreign else ""
            raise RecipeError(
                f"no {file.name} in this folder{hint}: weights are read from safetensors only",
                where=str(path),
                fix="save the model with `save_pretrained` of transformers, or copy the missing file",
            )
    return shards


def _complete_tensors(file: Path) -> dict[str, list[int]]:
    """Tensor name to shape of one safetensors file whose size agrees with its header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if 0 < length <= size - 8 else b""
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(file, f"its header is unreadable ({size} bytes on disk)") from None
    if 8 + length + end != size:
        raise _broken(file, f"it should have {8 + length + end} bytes and has {size}")
    return {name: entry.get("shape", []) for name, entry in tensors.items()}


def _broken(file: Path, why: str) -> RecipeError:
    return RecipeError(
        f"{file.name} is truncated or damaged: {why}", where=str(file), fix="copy or download the file again"
    )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise RecipeError(
            "this model folder does not exist", where=str(path), fix="give the folder that has config.json"
        )
    if not (path / "config.json").is_file():
        raise RecipeError(
            "this model folder has no config.json",
            where=str(path),
            fix="give the folder that `save_pretrained` wrote, or add the model's config.json",
        )
    return _read_json(path / "config.json")


def _architecture(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json as it is, and normalised."""
    config = _config(path)
    try:
        return config, normalise(config)
    except RecipeError as error:
        where = str(path / "config.json")
        raise RecipeError(problems=[replace(problem, where=where) for problem in error.problems]) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{file.name} is not valid JSON: {error}", where=str(file), fix="copy the file again"
        ) from None
    if not isinstance(content, dict):
        raise RecipeError(f"{file.name} is not a JSON object", where=str(file), fix="copy the file again")
    return content


def _optional_json(file: Path) -> dict[str, Any]:
    return _read_json(file) if file.is_file() else {}


def _digest_tokenizer(file: Path) -> str:
    return _sha(_canonical(_tokenizer_content(_read_json(file))))


def _largest_token(file: Path) -> str:
    """The largest id that a tokenizer.json knows, as text; -1 if it knows none."""
    content = _read_json(file)
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    # A Unigram model lists its pieces by id.
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return str(max((*ids, *(token["id"] for token in content.get("added_tokens") or ())), default=-1))


def _tokenizer_content(tokenizer: dict[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in tokenizer.items() if key not in (*_STATE_OF_LAST_CALL, "version")}
    model = dict(content.pop("model", None) or {})
    # The vocabulary is data: a token may be spelt like a field of the library.
    vocabulary = model.pop("vocab", None)
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.pop("merges", None) or []]
    return {"vocab": vocabulary, "merges": merges, "model": _without_defaults(model), **_without_defaults(content)}


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_defaults(item)
            for key, item in value.items()
            if key not in _LIBRARY_DEFAULTS or item != _LIBRARY_DEFAULTS[key]
        }
    return [_without_defaults(item) for item in value] if isinstance(value, list) else value


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
