"""What a model costs to serve, measured on the model itself: cache bytes, tokens per second, memory."""

from __future__ import annotations

import inspect
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from posttrain.generation import DecodeEngine, Sampling, unsupported

log = logging.getLogger(__name__)

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
) -> dict[str, dict[str, float | str]]:
    """Tokens per second of each model, summed over the batch: medians over `repeats` after one warm-up.

    Measured is the decoder that users get (`posttrain.generation`): `decoder` is "engine". If it does not support one
    of the models, all are measured with their own forward and a growing cache ("transformers"), or the figures would
    compare decoders instead of models. The models take turns, so that a machine that slows down slows all of them.
    `boundary` is called between any two measurements. On CUDA `inference_peak_bytes` is added: weights, cache and the
    most that a prefill and its decoding held besides.
    """
    decoder = _decoder_for_all(models)
    measured = _ByDecoder if decoder == "engine" else _ByModel
    shape = (batch_size, prefill_tokens, decode_tokens)
    runs: dict[str, _ByDecoder | _ByModel] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    for repeat in range(repeats + 1):
        for name, model in models.items():
            boundary()
            if name not in runs:
                runs[name] = measured(model, *shape)
            prefill, decode, peak = runs[name]()
            peaks[name] = max(peaks[name], peak)
            if repeat:
                seconds[name].append((prefill, decode))
    figures = {}
    for name, timed in seconds.items():
        prefill, decode = (statistics.median(column) for column in zip(*timed, strict=True))
        figures[name] = {
            "decoder": decoder,
            "prefill_tokens_per_second": batch_size * prefill_tokens / prefill,
            "decode_tokens_per_second": batch_size * decode_tokens / decode,
        }
        if peaks[name]:
            figures[name]["inference_peak_bytes"] = peaks[name]
    return figures


def _decoder_for_all(models: Mapping[str, Any]) -> str:
    """The decoder that can run every model, which is said in the log: "engine" or "transformers"."""
    reasons = [f"{name}: {reason}" for name, model in models.items() if (reason := unsupported(model))]
    if not reasons:
        log.info("decoder: engine, for the speed of %s", " and ".join(models))
        return "engine"
    log.warning(
        "decoder: transformers, for the speed of %s: the fast decoder does not support %s",
        " and ".join(models),
        "; ".join(reasons),
    )
    return "transformers"


class _ByDecoder:
    """Prefill and decoding by `DecodeEngine`, which is made once: on a GPU its steps are captured in the warm-up."""

    def __init__(self, model: Any, batch: int, prefill_tokens: int, decode_tokens: int) -> None:
        self.device = model.device
        self.prompts = _random_ids(model, batch, prefill_tokens).tolist()
        # The first new token comes from the prompt, so that one more is written than decoded.
        self.sampling = Sampling(max_new_tokens=decode_tokens + 1)
        self.engine = DecodeEngine(model, batch, prefill_tokens + decode_tokens + 1, dtype=model.dtype, share=True)

    def __call__(self) -> tuple[float, float, int]:
        """Seconds of the prefill, seconds of the decoding, and peak bytes (0 on a CPU)."""
        before = _allocated_before(self.device)
        answers = self.engine.generate(self.prompts, self.sampling)
        peak = _allocated_beyond(self.device, before, self.engine.bytes())
        return answers.prefill_seconds, answers.seconds - answers.prefill_seconds, peak


class _ByModel:
    """Prefill and decoding by the model's own forward, token by token."""

    def __init__(self, model: Any, batch: int, prefill_tokens: int, decode_tokens: int) -> None:
        self.model, self.decode_tokens = model, decode_tokens
        self.device = model.get_input_embeddings().weight.device
        self.ids = _random_ids(model, batch, prefill_tokens).to(self.device)
        self.options = last_logits_alone(model)

    @torch.inference_mode()
    def __call__(self) -> tuple[float, float, int]:
        """As `_ByDecoder`."""
        before = _allocated_before(self.device)
        started = _now(self.device)
        output = self.model(input_ids=self.ids, use_cache=True, **self.options)
        prefilled = _now(self.device)
        for _ in range(self.decode_tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = self.model(input_ids=token, past_key_values=output.past_key_values, use_cache=True, **self.options)
        decoded = _now(self.device)
        peak = _allocated_beyond(self.device, before, _weight_bytes(self.model))
        return prefilled - started, decoded - prefilled, peak


def last_logits_alone(model: Any, rows: int = 1) -> dict[str, int]:
    """Arguments of the model's forward that ask for the last `rows` logits, where it can be asked."""
    return {"logits_to_keep": rows} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(0))


def _allocated_before(device: torch.device) -> int:
    """Bytes allocated now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _allocated_beyond(device: torch.device, before: int, standing: int) -> int:
    """`standing` bytes and the most that was allocated beyond `before`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) - before + standing if device.type == "cuda" else 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _weight_bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
