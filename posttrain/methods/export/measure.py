"""What an export costs on text: errors of every layer against the source, perplexities and divergences.

Legend: B batch, T tokens, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.data.reading import encode_documents, read_rows
from posttrain.errors import StageError
from posttrain.methods.export.config import ExportConfig
from posttrain.methods.export.verify import prompt_ids
from posttrain.models.loading import load_tokenizer

ROWS = 128
"""Rows of logits that are compared at a time."""


def documents(data: Path, model_folder: Path, cfg: ExportConfig, positions: int) -> list[Tensor]:
    """Token ids [1, T] of the first documents, at least two tokens each.

    Raises:
        StageError: there is none.
    """
    rows = read_rows(data)[: cfg.max_documents]
    encoded = encode_documents(rows, load_tokenizer(model_folder), max_tokens=min(cfg.max_tokens, positions))
    found = [torch.tensor([ids]) for ids in encoded if len(ids) > 1]
    if not found:
        raise StageError("no document of two tokens or more", str(data), "give more text: inputs.data=…")
    return found


@torch.no_grad()
def on_text(models: Mapping[str, Any], data: Path, folder: Path, cfg: ExportConfig) -> dict[str, Any]:
    """Perplexity of every model and KL(other‖export), nats per token, on the text; models that are None are left out.

    Args:
        models: "export" and those it is compared with, fp32 arithmetic.
        folder: whose tokenizer is used.
    """
    models = {name: model for name, model in models.items() if model is not None}
    nll, kl = dict.fromkeys(models, 0.0), {name: 0.0 for name in models if name != "export"}
    texts = documents(data, folder, cfg, models["export"].config.max_position_embeddings)
    for ids in texts:
        logits = {name: model(ids, use_cache=False).logits[0, :-1] for name, model in models.items()}
        for start in range(0, ids.shape[1] - 1, ROWS):
            rows = slice(start, start + ROWS)
            logs = {name: torch.log_softmax(found[rows].float(), -1) for name, found in logits.items()}
            for name, log in logs.items():
                nll[name] -= log.gather(-1, ids[0, 1:][rows, None]).double().sum().item()
            for name in kl:
                kl[name] += (logs[name].exp() * (logs[name] - logs["export"])).sum(-1).double().sum().item()
    tokens = sum(ids.shape[1] - 1 for ids in texts)
    return {
        "documents": len(texts),
        "tokens": tokens,
        "perplexity": {name: math.exp(total / tokens) for name, total in nll.items()},
        "kl_to_export": {name: total / tokens for name, total in kl.items()},
    }


@torch.no_grad()
def layer_errors(source: Any, converted: Any, data: Path | None, folder: Path, cfg: ExportConfig) -> list[float]:
    """By layer, root of lost over total energy of what attention adds to the residual stream.

    Both attentions of a layer see the source's activations, so that errors do not add up. Without text the fixed
    prompts are used.
    """
    positions = converted.config.max_position_embeddings
    given = [prompt_ids(converted.config.vocab_size, 0)] if data is None else documents(data, folder, cfg, positions)
    sums = [[0.0, 0.0] for _ in converted.model.layers]
    handles = [
        layer.self_attn.register_forward_hook(_comparing(converted, index, sums[index]), with_kwargs=True)
        for index, layer in enumerate(source.model.layers)
    ]
    try:
        for ids in given:
            source.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [math.sqrt(lost / total) if total > 0 else 0.0 for lost, total in sums]


def _comparing(converted: Any, index: int, sums: list[float]) -> Any:
    """A hook on the source's attention of a layer that adds lost and total energy to `sums`."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        wanted = (output[0] if isinstance(output, tuple) else output).double()
        sums[0] += (wanted - _attend(converted.model, index, x).double()).square().sum().item()
        sums[1] += wanted.square().sum().item()

    return hook


def _attend(model: Any, index: int, x: Tensor) -> Tensor:
    """Attention of one layer of an upcycled decoder on block inputs [B, T, D] from position 0."""
    positions = torch.arange(x.shape[1])[None]
    group = model.rotary_emb.groups[index]
    embeddings = None if group is None else model.rotary_emb(x, position_ids=positions)[group]
    mask = model._masks(x, None, None, positions)["causal"]
    found = model.layers[index].self_attn(
        hidden_states=x, position_embeddings=embeddings, attention_mask=mask, position_ids=positions
    )
    return found[0] if isinstance(found, tuple) else found
