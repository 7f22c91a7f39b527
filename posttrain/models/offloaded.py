"""A model whose weights stay on disk: a part of it is read when it is needed and forgotten afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from posttrain.errors import StageError
from posttrain.models.inspect import INDEX, WEIGHTS, check_model_folder


class OffloadedModel:
    """The skeleton of a folder's model, on the meta device but for its rotary embedding.

    Attributes:
        model: the causal LM; parameters of a part are real inside `held`.
        config: its config.

    Raises:
        RecipeError: the folder is not a complete model of a supported family.
        StageError: its tensors are not those of its architecture.
    """

    def __init__(self, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        check_model_folder(folder)
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        self.config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        # Its buffers are computed, not stored.
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(config=self.model.config).to(device)
        self._files, shapes = _stored(self.folder)
        for name, other in self.model.all_tied_weights_keys.items():  # one tensor, stored under either name
            if other not in self._files and name in self._files:
                self._files[other], shapes[other] = self._files[name], shapes[name]
        self._tied = {other: name for name, other in self.model.all_tied_weights_keys.items()}
        self._check(shapes)

    def tensor(self, name: str) -> Tensor:
        """One stored tensor on the device, in `dtype`.

        Raises:
            StageError: the file that should hold it is broken.
        """
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                stored = name if name in tensors.keys() else self._tied[name]  # noqa: SIM118
                return tensors.get_tensor(stored).to(self.device, self.dtype)
        except (SafetensorError, OSError) as error:
            raise StageError(
                f"{name} cannot be read: {error}", where=str(file), fix="fetch or save the model again"
            ) from error

    def generation_config(self) -> GenerationConfig:
        """The folder's generation settings, or those that follow from the config."""
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(str(self.folder), local_files_only=True)
        return GenerationConfig.from_model_config(self.config)

    @contextmanager
    def held(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        """Inside, the module's parameters are there; `prefix` is its name in the model."""
        names = [name for name, _ in module.named_parameters()]
        module.load_state_dict({name: self.tensor(f"{prefix}.{name}") for name in names}, strict=False, assign=True)
        module.requires_grad_(False)
        try:
            yield module
        finally:
            module.to("meta")

    def held_layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """`held` of one decoder layer."""
        return self.held(self.model.model.layers[index], f"model.layers.{index}")

    def _check(self, shapes: dict[str, list[int]]) -> None:
        state = self.model.state_dict()
        # Old checkpoints carry rotary buffers that no class reads any more.
        extra = {name for name in shapes.keys() - state.keys() if not name.endswith("rotary_emb.inv_freq")}
        reshaped = {name for name in state.keys() & shapes.keys() if list(state[name].shape) != shapes[name]}
        absent = state.keys() - shapes.keys() - set(self.model.all_tied_weights_keys)
        wrong = {"missing": absent, "of another shape": reshaped, "unexpected": extra}
        if any(wrong.values()):
            said = "; ".join(f"{kind}: {', '.join(sorted(names)[:3])}" for kind, names in wrong.items() if names)
            raise StageError(
                f"the weights do not fit the architecture in config.json ({said})",
                where=str(self.folder),
                fix="save the model again with its own config.json",
            )


def _stored(folder: Path) -> tuple[dict[str, Path], dict[str, list[int]]]:
    """File and shape of every stored tensor, from the headers of the model's own files."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    files, shapes = {}, {}
    for file in (folder / name for name in names):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                files[name], shapes[name] = file, tensors.get_slice(name).get_shape()
    return files, shapes
