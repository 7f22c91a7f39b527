"""A conversion by layer, for models larger than memory: the same numbers, one decoder layer there at a time.

What is kept meanwhile: the hidden states of the calibration text (tokens · D · 4 bytes, on the host), the moments of
every layer in files, the plan. The source is read up to three times, four where ranks follow from spectra.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.methods.mla_upcycling.build import build_plan
from posttrain.methods.mla_upcycling.calibration import CalibrationStatistics, layer_statistics
from posttrain.methods.mla_upcycling.config import MlaUpcycleConfig
from posttrain.methods.mla_upcycling.convert import converted_config, layer_tensors, rotary_scale, write_tensors
from posttrain.methods.mla_upcycling.plan import MlaPlan

if TYPE_CHECKING:
    from posttrain.models.offloaded import OffloadedModel
    from posttrain.models.upcycled import UpcycledForCausalLM

Done = Callable[[int], None] | None
"""Called with the number of layers done; it may raise to stop."""


class StoredStatistics:
    """Calibration statistics in one file a layer; read as `CalibrationStatistics.of_layer` is."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens

    def store(self, index: int, found: CalibrationStatistics) -> None:
        second, mean, queries = found.of_layer(0)
        tensors = {"second": second, "mean": mean, **({} if queries is None else {"queries": queries})}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, self._file(index))

    def of_layer(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """`second`, `mean` and `queries` of one layer."""
        tensors = load_file(self._file(index))
        return tensors["second"], tensors["mean"], tensors.get("queries")

    def _file(self, index: int) -> Path:
        return self.folder / f"statistics-{index}.safetensors"


def collect_by_layer(
    source: OffloadedModel, batches: Sequence[Tensor], folder: Path, on_layer: Done = None
) -> StoredStatistics:
    """What `collect_statistics` collects, layer by layer into files under `folder`.

    Raises:
        ValueError: no tokens, or values that are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = StoredStatistics(folder, sum(batch.numel() for batch in batches))
    calls = _layer_calls(source, batches)
    for index in range(source.config.num_hidden_layers):
        with source.held_layer(index) as layer:
            statistics, outputs = layer_statistics(layer, calls, source.config.hidden_size, found.tokens)
        found.store(index, statistics)
        calls = [(hidden, rest) for hidden, (_, rest) in zip(outputs, calls, strict=True)]
        if on_layer is not None:
            on_layer(index + 1)
    return found


def plan_by_layer(
    source: OffloadedModel, cfg: MlaUpcycleConfig, statistics: StoredStatistics | None, on_layer: Done = None
) -> MlaPlan:
    """`build_plan` of a model on disk."""
    return build_plan(source.model, cfg, statistics, on_layer, source.held_layer)


def shards_by_layer(source: OffloadedModel, plan: MlaPlan, on_layer: Done = None) -> Iterator[dict[str, Tensor]]:
    """Tensors of the converted model: one decoder layer after the other, then embeddings, norm and head."""
    new = skeleton(source, plan)
    scale = rotary_scale(source.model)
    for index, target in enumerate(new.model.layers):
        prefix = f"model.layers.{index}."
        with source.held_layer(index) as layer, torch.no_grad():
            attention = target.self_attn.to_empty(device=source.device)
            write_tensors(attention, layer_tensors(layer.self_attn, plan.layers[index], plan.shape, scale))
            shard = {prefix + "self_attn." + name: tensor for name, tensor in attention.state_dict().items()}
            kept = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("self_attn.")}
            yield shard | {prefix + name: tensor for name, tensor in kept.items()}
            del attention, shard, kept
            target.to("meta")
        if on_layer is not None:
            on_layer(index + 1)
    around = [name for name in new.state_dict() if not name.startswith("model.layers.")]
    yield {name: source.tensor(name) for name in around if name not in new.all_tied_weights_keys}


def skeleton(source: OffloadedModel, plan: MlaPlan) -> UpcycledForCausalLM:
    """The converted model on the meta device."""
    from posttrain.models.upcycled import UpcycledForCausalLM

    with torch.device("meta"):
        new = UpcycledForCausalLM._from_config(converted_config(source.config, plan), dtype=source.dtype)
    new.generation_config = source.generation_config()
    return new.eval()


def _layer_calls(source: OffloadedModel, batches: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """Arguments of the first decoder layer for every batch; those but the hidden states are the same in every layer."""
    model = source.model.model
    with _in_place_of_layers(model) as caught, torch.no_grad():
        with source.held(model.embed_tokens, "model.embed_tokens"), source.held(model.norm, "model.norm"):
            for batch in batches:
                model(input_ids=batch.to(source.device), use_cache=False)
    return caught


@contextmanager
def _in_place_of_layers(model: nn.Module) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    catcher, layers = _Catcher(), model.layers
    model.layers = nn.ModuleList([catcher])
    try:
        yield catcher.caught
    finally:
        model.layers = layers


class _Catcher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.caught: list[tuple[Tensor, dict[str, Any]]] = []

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        self.caught.append((hidden_states.cpu(), rest))
        return hidden_states
