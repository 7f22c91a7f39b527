"""The operators of one decoded token, timed as replays of a CUDA graph, against eager torch.

Shapes are SmolLM2-135M's and Llama-3.2-1B's, with latent caches of the widths below for latent attention. Activations
stay in the L2 cache from call to call, as they do behind the projection that wrote them; caches of keys and values do
not: calls rotate among copies that exceed it. Every fourth part of a row's slots is padding on average. Each
implementation has copies of its own, so that none finds what another wrote into a cache. Peers of attention are given
their mask ready made (additive for SDPA, which would convert another at every call): a model makes it once a token.

Limit: the bytes of inputs and outputs over the measured copy rate. Below about 2 microseconds the launch binds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from posttrain_kernels.decode_attention import decode_attention, decode_attention_reference
from posttrain_kernels.mamba_step import conv_step, conv_step_reference, gated_norm, gated_norm_reference
from posttrain_kernels.rms_norm import rms_norm, rms_norm_reference
from posttrain_kernels.rotary_cache import rotary_cache, rotary_cache_reference
from posttrain_kernels.swiglu import silu_mul, silu_mul_reference
from torch import Tensor, nn

from benchmarks.harness import OURS, Case
from benchmarks.heads import dtype_for

GRAPH_CALLS = 40
ROTATED_BYTES = 256 * 2**20
"""Copies of a cache that calls rotate among add up to this at least (the L2 cache of an H200 holds 50 MiB)."""
EPS = 1e-5
TAPS = 4
"""Of Mamba-2's convolution."""


@dataclass(frozen=True)
class Model:
    """Shapes of a source and of its latent attention (r and d_r)."""

    name: str
    width: int
    heads: int
    shared: int
    head: int
    mlp: int
    rank: int
    rope: int


MODELS = (
    Model("SmolLM2-135M", 576, 9, 3, 64, 1536, 192, 32),
    Model("Llama-3.2-1B", 2048, 32, 8, 64, 8192, 512, 32),
)
ROWS = (64, 256, 1024)
CAPACITY = 256
QUICK_MODEL = Model("tiny", 64, 4, 2, 16, 96, 24, 8)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Every operator for every model and batch."""
    models, rows = ((QUICK_MODEL,), (3,)) if quick else (MODELS, ROWS)
    makers = (_rms_norm, _silu_mul, _conv_step, _gated_norm, _rotary_cache, _grouped_attention, _latent_attention)
    return [make(model, count, device) for make, model, count in itertools.product(makers, models, rows)]


def _case(
    operator: str,
    shape: str,
    device: torch.device,
    inputs: Callable[[], tuple],
    functions: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
    count: float,
    copies: int = 1,
    prepare: Mapping[str, Callable[..., tuple]] | None = None,
) -> Case:
    """A case of functions of the same arguments; `count` bytes moved; tensors rotate among `copies` equal ones.

    `prepare` makes the arguments of an implementation from the inputs, before its calls are measured.
    """
    prepare = prepare or {}
    return Case(
        operator=operator,
        shape=shape,
        dtype=str(dtype_for(device)).removeprefix("torch."),
        direction="fwd",
        inputs=inputs,
        implementations={name: _rotating(function, copies, prepare.get(name)) for name, function in functions.items()},
        reference=lambda given: _named(reference(*(_wide(value) for value in given))),
        limit_ms=lambda ceilings: ceilings.bytes_ms(count),
        graph_calls=GRAPH_CALLS,
        flush=False,
    )


def _rotating(
    function: Callable[..., Any], copies: int, prepare: Callable[..., tuple] | None = None
) -> Callable[[tuple], tuple]:
    """Call after call takes the next copy of the arguments; the values are equal, the memory is not.

    The inputs themselves are never used: what an implementation writes must not be there for the next.
    """

    def implementation(given: tuple) -> tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]]]:
        sets = [_copy(given) for _ in range(copies)]
        turn = itertools.cycle(sets if prepare is None else [prepare(*copy) for copy in sets])
        return (lambda: function(*next(turn))), _named

    return implementation


def _copy(given: tuple) -> tuple:
    """New memory for each tensor; a tensor that occurs twice (a latent cache) stays one."""
    made = {id(value): value.clone() for value in given if isinstance(value, Tensor)}
    return tuple(made.get(id(value), value) for value in given)


def _named(outputs: Any) -> dict[str, Tensor]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {f"out{index}": output for index, output in enumerate(outputs)}


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype_for(device))


def _bytes(device: torch.device, elements: float) -> float:
    return elements * dtype_for(device).itemsize


def _rms_norm(model: Model, rows: int, device: torch.device) -> Case:
    def inputs() -> tuple:
        x, residual = _randn(device, rows, model.width), _randn(device, rows, model.width)
        return x, _randn(device, model.width), EPS, residual

    def functional(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return nn.functional.rms_norm(summed, weight.shape, weight, eps), summed

    functions = {OURS: rms_norm, "eager": rms_norm_reference, "functional": functional}
    moved = _bytes(device, 4 * rows * model.width)
    shape = f"{model.name} B{rows} D{model.width}"
    return _case("rms_norm", shape, device, inputs, functions, rms_norm_reference, moved)


def _silu_mul(model: Model, rows: int, device: torch.device) -> Case:
    functions = {OURS: silu_mul, "eager": silu_mul_reference}
    moved, shape = _bytes(device, 3 * rows * model.mlp), f"{model.name} B{rows} I{model.mlp}"
    return _case(
        "silu_mul",
        shape,
        device,
        lambda: (_randn(device, rows, 2 * model.mlp),),
        functions,
        silu_mul_reference,
        moved,
    )


def _conv_step(model: Model, rows: int, device: torch.device) -> Case:
    heads = (model.shared, model.shared, model.heads)
    channels = sum(heads) * model.head

    def inputs() -> tuple:
        drive, taps = _randn(device, rows, channels), _randn(device, channels, TAPS)
        # Every column as the new one: what a call leaves is what it found, so that all calls give the same.
        columns = drive[..., None].expand(-1, -1, TAPS).contiguous()
        return drive, columns, taps, _randn(device, channels), heads

    functions = {OURS: conv_step, "eager": conv_step_reference}
    moved = _bytes(device, (2 * rows + 1) * channels * (TAPS + 1))
    shape = f"{model.name} B{rows} C{channels} K{TAPS}"
    return _case("conv_step", shape, device, inputs, functions, conv_step_reference, moved)


def _gated_norm(model: Model, rows: int, device: torch.device) -> Case:
    width = model.heads * model.head

    def inputs() -> tuple:
        return _randn(device, rows, width), _randn(device, rows, width), _randn(device, width), EPS, model.head

    functions = {OURS: gated_norm, "eager": gated_norm_reference}
    moved, shape = _bytes(device, 3 * rows * width), f"{model.name} B{rows} H{model.heads} d{model.head}"
    return _case("gated_norm", shape, device, inputs, functions, gated_norm_reference, moved)


def _rotary_cache(model: Model, rows: int, device: torch.device) -> Case:
    def inputs() -> tuple:
        qkv = _randn(device, rows, (model.heads + 2 * model.shared) * model.head)
        angles = torch.rand(CAPACITY, model.head, device=device) * 2 * math.pi
        positions = torch.randint(0, CAPACITY, (rows,), device=device)
        caches = (torch.zeros(rows, model.shared, CAPACITY, model.head, device=device, dtype=qkv.dtype) for _ in "kv")
        slot = torch.tensor(CAPACITY // 2, device=device)
        return qkv, angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype), positions, slot, *caches

    def written(function: Callable[..., Tensor]) -> Callable[..., tuple]:
        # The caches are returned whole: taking the slot out would be another kernel inside the measurement.
        def run(*given: Any) -> tuple:
            return function(*given), given[5], given[6]

        return run

    functions = {OURS: written(rotary_cache), "eager": written(rotary_cache_reference)}
    moved = _bytes(device, 2 * rows * (model.heads + 2 * model.shared) * model.head)
    shape = f"{model.name} B{rows} H{model.heads} G{model.shared} d{model.head}"
    return _case("rotary_cache", shape, device, inputs, functions, written(rotary_cache_reference), moved)


def _starts(rows: int, device: torch.device) -> Tensor:
    """Left padding, none to half of the slots."""
    return torch.randint(0, CAPACITY // 2 + 1, (rows,), device=device)


def _grouped_attention(model: Model, rows: int, device: torch.device) -> Case:
    def inputs() -> tuple:
        caches = (_randn(device, rows, model.shared, CAPACITY, model.head) for _ in "kv")
        q, length = _randn(device, rows, model.heads, model.head), torch.tensor(CAPACITY, device=device)
        return q, *caches, _starts(rows, device), length, model.head**-0.5

    def sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
        keys, values = (cache.repeat_interleave(model.heads // model.shared, dim=1) for cache in (keys, values))
        return _sdpa(q, keys, values, mask, scale)

    def sdpa_gqa(*given: Any) -> Tensor:
        return _sdpa(*given, enable_gqa=True)

    functions = {OURS: decode_attention, "sdpa": sdpa, "sdpa_gqa": sdpa_gqa}
    cached = _bytes(device, 2 * rows * model.shared * CAPACITY * model.head)
    moved = 0.75 * cached + _bytes(device, 2 * rows * model.heads * model.head)
    shape = f"{model.name} B{rows} H{model.heads} G{model.shared} d{model.head} S{CAPACITY}"
    copies = math.ceil(ROTATED_BYTES / cached) if device.type == "cuda" else 1
    return _case(
        "decode_attention",
        shape,
        device,
        inputs,
        functions,
        decode_attention_reference,
        moved,
        min(copies, GRAPH_CALLS),
        {"sdpa": _sdpa_arguments, "sdpa_gqa": _sdpa_arguments},
    )


def _sdpa(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, **options: Any) -> Tensor:
    attend = nn.functional.scaled_dot_product_attention
    return attend(q.unsqueeze(2), keys, values, attn_mask=mask, scale=scale, **options).squeeze(2)


def _outside(cache: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """[B, S], true where a row has no slot."""
    slots = torch.arange(cache.shape[2], device=cache.device)
    return (slots < start[:, None]) | (slots >= length)


def _sdpa_arguments(q: Tensor, keys: Tensor, values: Tensor, start: Tensor, length: Tensor, scale: float) -> tuple:
    """Bounds become an additive mask [B, 1, 1, S]."""
    outside = _outside(keys, start, length)[:, None, None]
    return q, keys, values, torch.zeros_like(outside, dtype=q.dtype).masked_fill(outside, -torch.inf), scale


def _latent_attention(model: Model, rows: int, device: torch.device) -> Case:
    def inputs() -> tuple:
        latent, k_rope = _randn(device, rows, 1, CAPACITY, model.rank), _randn(device, rows, 1, CAPACITY, model.rope)
        q, q_rope = _randn(device, rows, model.heads, model.rank), _randn(device, rows, model.heads, model.rope)
        length = torch.tensor(CAPACITY, device=device)
        return q, latent, latent, _starts(rows, device), length, (model.rank + model.rope) ** -0.5, q_rope, k_rope

    functions = {OURS: decode_attention, "eager": _absorbed}
    cached = _bytes(device, rows * CAPACITY * (model.rank + model.rope))
    moved = 0.75 * cached + _bytes(device, rows * model.heads * (2 * model.rank + model.rope))
    shape = f"{model.name} B{rows} H{model.heads} r{model.rank} dr{model.rope} S{CAPACITY}"
    copies = math.ceil(ROTATED_BYTES / cached) if device.type == "cuda" else 1
    return _case(
        "decode_attention",
        shape,
        device,
        inputs,
        functions,
        decode_attention_reference,
        moved,
        min(copies, GRAPH_CALLS),
        {"eager": _absorbed_arguments},
    )


def _absorbed(q: Tensor, latent: Tensor, outside: Tensor, scale: float, q_rope: Tensor, k_rope: Tensor) -> Tensor:
    """The products of the model's own absorbed path."""
    latent, k_rope = latent.squeeze(1), k_rope.squeeze(1)
    scores = torch.baddbmm(torch.bmm(q_rope, k_rope.transpose(1, 2)), q, latent.transpose(1, 2)).float() * scale
    weights = scores.masked_fill(outside, torch.finfo(scores.dtype).min).softmax(dim=-1).to(latent.dtype)
    return torch.bmm(weights, latent)


def _absorbed_arguments(
    q: Tensor,
    latent: Tensor,
    _: Tensor,
    start: Tensor,
    length: Tensor,
    scale: float,
    q_rope: Tensor,
    k_rope: Tensor,
) -> tuple:
    """Bounds become a mask [B, 1, S]."""
    return q, latent, _outside(latent, start, length)[:, None], scale, q_rope, k_rope
