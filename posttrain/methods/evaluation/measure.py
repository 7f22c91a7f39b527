"""What a model costs to serve, measured on the model itself: cache bytes, tokens per second, memory."""

from __future__ import annotations

import inspect
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

CACHE_LENGTHS = (16, 48)
"""The two prompt lengths whose cache sizes are compared."""


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable through containers and the attributes of cache layers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def live_cache_bytes(cache: Any) -> int:
    """Bytes of all tensors held by the layers of a transformers cache; a tensor kept under two names counts once."""
    seen: dict[tuple[Any, ...], int] = {}
    for layer in cache.layers:
        for tensor in tensors_in(vars(layer)):
            size = tensor.numel() * tensor.element_size()
            if size:
                seen[(str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride())] = size
    return sum(seen.values())


@torch.inference_mode()
def cache_bytes(model: Any) -> tuple[float, float]:
    """`(bytes per token, constant bytes)` of the live cache of one sequence, from prefills of two lengths.

    Exact: `bytes(n) = constant + n * per_token` for keys, values and latents. Both are whole numbers unless a layer
    stores something that is neither constant nor linear.
    """
    short, long = CACHE_LENGTHS
    device = model.get_input_embeddings().weight.device
    sizes = []
    for length in (short, long):
        ids = (torch.arange(length, device=device) % model.config.vocab_size)[None]
        sizes.append(live_cache_bytes(model(input_ids=ids, use_cache=True).past_key_values))
    per_token = (sizes[1] - sizes[0]) / (long - short)
    constant = sizes[0] - per_token * short
    return (int(per_token), int(constant)) if per_token.is_integer() else (per_token, constant)


def parameter_count(model: Any) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def process_peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def throughput(
    models: Mapping[str, Any],
    *,
    prefill_tokens: int,
    decode_tokens: int,
    batch_size: int,
    repeats: int,
    boundary: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Tokens per second of each model, summed over the batch: medians over `repeats` after one warm-up.

    The models take turns, so that a machine that slows down slows all of them. `boundary` is called between any two
    measurements. On CUDA `inference_peak_bytes` is added: the model's weights plus the most that a prefill and its
    decoding held beyond what was allocated before.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for repeat in range(repeats + 1):
        for name, model in models.items():
            boundary()
            prefill, decode, peak = _prefill_and_decode(model, batch_size, prefill_tokens, decode_tokens)
            if repeat:
                seconds[name].append((prefill, decode))
                peaks[name] = max(peaks[name], peak)
    figures = {}
    for name, timed in seconds.items():
        prefill, decode = (statistics.median(column) for column in zip(*timed, strict=True))
        figures[name] = {
            "prefill_tokens_per_second": batch_size * prefill_tokens / prefill,
            "decode_tokens_per_second": batch_size * decode_tokens / decode,
        }
        if peaks[name]:
            figures[name]["inference_peak_bytes"] = peaks[name]
    return figures


@torch.inference_mode()
def _prefill_and_decode(model: Any, batch: int, prefill_tokens: int, decode_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill, seconds of the decoding, and peak bytes (0 on a CPU)."""
    device = model.get_input_embeddings().weight.device
    cuda = device.type == "cuda"
    ids = torch.randint(
        model.config.vocab_size, (batch, prefill_tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else 0

    started = _now(device)
    output = model(input_ids=ids, use_cache=True, **options)
    prefilled = _now(device)
    for _ in range(decode_tokens):
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **options)
    decoded = _now(device)

    peak = torch.cuda.max_memory_allocated(device) - before + _weight_bytes(model) if cuda else 0
    return prefilled - started, decoded - prefilled, peak


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _weight_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
