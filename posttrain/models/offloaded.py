"""A model whose weights stay on disk: a part of it is read when it is needed and forgotten afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from posttrain.errors import StageError
from posttrain.models.inspect import check_model_folder

INDEX = "model.safetensors.index.json"


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
        self._files = _files(self.folder)
        wanted = set(self.model.state_dict()) - set(self.model.all_tied_weights_keys)
        if absent := sorted(wanted - self._files.keys()):
            raise StageError(
                f"the weights do not fit the architecture in config.json (missing: {', '.join(absent[:3])})",
                where=str(self.folder),
                fix="save the model again with its own config.json",
            )

    def tensor(self, name: str) -> Tensor:
        """One stored tensor on the device, in `dtype`.

        Raises:
            StageError: the file that should hold it is broken.
        """
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name).to(self.device, self.dtype)
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

    def held_layer(self, index: int) -> Iterator[nn.Module]:
        """`held` of one decoder layer."""
        return self.held(self.model.model.layers[index], f"model.layers.{index}")


def _files(folder: Path) -> dict[str, Path]:
    """The weight file of every stored tensor."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in index.items()}
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found
