"""A state-space mixer's first weights from attention's: one contract, a function for each start.

Linear attention `S_t = S_{t-1} + v_t k_tᵀ, y_t = S_t q_t` is the recurrence with decay one and steps of one, hence
query → C, key → B, value → x, output → out (MambaInLlama, arXiv 2408.15237). Softmax, its normaliser and the rotation
of queries and keys are lost; what the published start adds to the path (gate, convolution, norm, skip) is random.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.models.upcycled.mamba_upcycled import DECAYS, STEP_SIZES, inverse_softplus

UNIT_GATE = 1.2784645427610738
"""The number whose SiLU is one."""
FORGET = (1e-4, 1 - 1e-6)
"""Bounds of a head's decay a: 0 and 1 are at infinity in A_log and dt_bias."""


@dataclass(frozen=True)
class AttentionStats:
    """What a start may know of an attention layer beside its four projections.

    Attributes:
        heads, kv_heads, head_dim: H, G, d_h.
        q_norm, k_norm: weights [d_h] of the norms on query and key heads, or None.
        distance: [H], mean attention distance of each head in tokens, or None where it was not measured.
    """

    heads: int
    kv_heads: int
    head_dim: int
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    distance: Tensor | None = None


@dataclass(frozen=True)
class MambaForm:
    """What of a `mamba2` mixer is optional; the fields `mamba_*` of the model's configuration."""

    kernel: int = 4
    repeat_before_conv: bool = False
    norm: bool = True
    bias: bool = False
    out_bias: bool = False


def init_from_attention(
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    o: nn.Linear,
    stats: AttentionStats,
    *,
    init: str = "published",
    form: MambaForm | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Every parameter of a `mamba2` mixer by name, float64, from one attention layer's projections.

    Raises:
        ValueError: the form has no place for a bias of the source, or `aligned` lacks distances or its bias.
    """
    form = form or MambaForm()
    lost = [] if form.bias else [part for part in (q, k, v) if part.bias is not None]
    if lost or (o.bias is not None and not form.out_bias):
        raise ValueError("the source has biases that this form of the mixer has no place for")
    if init == "published":
        return _published(q, k, v, o, stats, form, generator or torch.Generator().manual_seed(0))
    if init == "aligned":
        return _aligned(q, k, v, o, stats, form)
    raise ValueError(f"init {init!r} is not one of published, aligned")


def decays_from_distance(distance: Tensor) -> Tensor:
    """The decay a of a head whose weights aˢ, s tokens back, have this mean distance: a / (1 − a) = distance."""
    distance = distance.double()
    return (distance / (1 + distance)).clamp(*FORGET)


def _published(
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    o: nn.Linear,
    stats: AttentionStats,
    form: MambaForm,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    heads, width, channels = stats.heads, q.in_features, _channels(stats, form)
    linear, taps = 1 / math.sqrt(width), 1 / math.sqrt(form.kernel)  # torch's bounds for both kinds of layer
    z = uniform(heads * stats.head_dim, width, low=-linear, high=linear)
    dt = uniform(heads, width, low=-linear, high=linear)
    tensors = _projections(q, k, v, o, z, dt, form)
    tensors["conv1d.weight"] = uniform(channels, 1, form.kernel, low=-taps, high=taps)
    tensors["conv1d.bias"] = uniform(channels, low=-taps, high=taps)
    tensors["A_log"] = uniform(heads, low=DECAYS[0], high=DECAYS[1]).log()
    low, high = map(math.log, STEP_SIZES)
    tensors["dt_bias"] = inverse_softplus(uniform(heads, low=low, high=high).exp())
    tensors["D"] = torch.ones(heads, dtype=torch.float64)
    return tensors | _norms(stats, form, 1.0)


def _aligned(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, stats: AttentionStats, form: MambaForm
) -> dict[str, Tensor]:
    """Attention without softmax, each head's weights falling by its decay a per token and summing to one.

    Δ = 1 − a gives the weights (1 − a) aˢ, A = ln(a) / Δ gives exp(Δ A) = a. Scores keep attention's 1/√d_h.
    """
    if stats.distance is None:
        raise ValueError("the aligned init needs each head's mean attention distance")
    if not form.bias or form.norm:
        raise ValueError("the aligned init needs a bias on in_proj (its gate is one there) and no norm")
    heads, width, channels = stats.heads, q.in_features, _channels(stats, form)
    inner, scale = heads * stats.head_dim, stats.head_dim**-0.5
    z, dt = (torch.zeros(rows, width, dtype=torch.float64) for rows in (inner, heads))
    tensors = _projections(q, k, v, o, z, dt, form, 1.0 if stats.q_norm is not None else scale)
    tensors["in_proj.bias"][:inner] = UNIT_GATE
    tensors["conv1d.weight"] = torch.zeros(channels, 1, form.kernel, dtype=torch.float64)
    tensors["conv1d.weight"][..., -1] = 1
    tensors["conv1d.bias"] = torch.zeros(channels, dtype=torch.float64)
    decay = decays_from_distance(stats.distance.cpu())
    tensors["A_log"] = (-decay.log() / (1 - decay)).log()
    tensors["dt_bias"] = inverse_softplus(1 - decay)
    tensors["D"] = torch.zeros(heads, dtype=torch.float64)
    return tensors | _norms(stats, form, scale)


def _projections(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, z: Tensor, dt: Tensor, form: MambaForm, scale: float = 1.0
) -> dict[str, Tensor]:
    """`in_proj`, rows in the order z, x, B, C, dt, and `out_proj`; queries times `scale`."""
    parts = [(v, 1.0), (k, 1.0), (q, scale)]
    weights = [_cpu(part.weight) * factor for part, factor in parts]
    tensors = {"in_proj.weight": torch.cat([z, *weights, dt]), "out_proj.weight": _cpu(o.weight)}
    if form.bias:
        biases = [_bias(part) * factor for part, factor in parts]
        zero = [torch.zeros(len(rows), dtype=torch.float64) for rows in (z, dt)]
        tensors["in_proj.bias"] = torch.cat([zero[0], *biases, zero[1]])
    if form.out_bias:
        tensors["out_proj.bias"] = _bias(o)
    return tensors


def _norms(stats: AttentionStats, form: MambaForm, query_scale: float) -> dict[str, Tensor]:
    """The norm behind the gate, and those of B and C where keys and queries have them."""
    tensors = {}
    if form.norm:
        tensors["norm.weight"] = torch.ones(stats.heads * stats.head_dim, dtype=torch.float64)
    if stats.q_norm is not None and stats.k_norm is not None:
        tensors["b_norm.weight"] = _cpu(stats.k_norm)
        tensors["c_norm.weight"] = _cpu(stats.q_norm) * query_scale
    return tensors


def _channels(stats: AttentionStats, form: MambaForm) -> int:
    shared = stats.heads if form.repeat_before_conv else stats.kv_heads
    return (stats.heads + 2 * shared) * stats.head_dim


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features, dtype=torch.float64) if linear.bias is None else _cpu(linear.bias)
