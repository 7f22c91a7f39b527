"""A packed copy of a model's weights, in the layout that one decoding step reads.

Legend: D hidden_size, I intermediate_size, V vocab_size, H query heads, G key/value heads, d head_dim, P positions;
r, d_n, d_r, d_v: latent, position-free key, rotary key and value width of latent attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from posttrain.errors import StageError
from posttrain.generation.support import unsupported
from posttrain.models.architecture import mixers, normalise, per_layer

Parts = tuple[torch.Tensor | None, ...]
"""Tensors that lie one below the other in one packed tensor; None stands for zeros (a bias that is not there)."""

WHERE = "posttrain.generation"


class Packed(NamedTuple):
    """How one packed tensor is made: its parts and the rows of each."""

    parts: Parts
    rows: tuple[int, ...]
    exact: bool = False
    """Kept in fp32 (fp64 in a decoder of fp64) whatever the type of the others."""


class DecoderWeights:
    """Weights of a supported model in one type on one device; `load` fills them in place.

    Attributes:
        arch: the architecture, as `posttrain.models.architecture.normalise` gives it.
        kinds: mixer of every layer.
        layers: per layer, packed tensors by name (see the mixers' `*_parts` and `_mlp_parts` below).
        embeddings [V, D], head [V, D] (the same tensor where tied), norm [D].
        rotary: per layer (cos, sin), each [P, d] or [P, d_r], shared between layers with equal tables; None for a layer
            that turns nothing.
    """

    def __init__(self, model: PreTrainedModel, positions: int, dtype: torch.dtype, share: bool = False) -> None:
        """Copy the weights of `model` on its device.

        Args:
            positions: length of the rotary tables, in tokens.
            share: a weight that needs no packing and is of that type already stays the model's own.

        Raises:
            StageError: the model has something the decoder does not know.
        """
        self.arch = _architecture(model)
        self.kinds = mixers(self.arch)
        self.positions, self.dtype, self.device, self.share = positions, dtype, model.device, share
        self.tied = model.lm_head.weight is model.get_input_embeddings().weight
        self.layers = [
            {name: self._empty(packed) for name, packed in parts.items()} for parts in _all_layer_parts(model, self)
        ]
        self.embeddings = self._empty(_packed(model.get_input_embeddings().weight))
        self.head = self.embeddings if self.tied else self._empty(_packed(model.lm_head.weight))
        self.norm = self._empty(_packed(model.model.norm.weight))
        self.rotary = self._rotary_tables(model)
        self._take(model)

    def load(self, model: PreTrainedModel) -> None:
        """Take over the weights of a model of the same architecture, in place: every storage stays where it is.

        Raises:
            StageError: another architecture, or a model the decoder does not know; or some weights are a model's own.
        """
        if self.share:
            raise StageError(
                "a decoder that shares weights with its model takes no others",
                where=WHERE,
                fix="make the DecodeEngine with share=False",
            )
        if _architecture(model) != self.arch or self.tied != (
            model.lm_head.weight is model.get_input_embeddings().weight
        ):
            raise StageError(
                "these weights are of another architecture than the decoder was made for",
                where=WHERE,
                fix="make a new DecodeEngine for the model",
            )
        self._take(model)

    def bytes(self) -> int:
        """Bytes of everything held, each storage once."""
        tensors = [self.embeddings, self.head, self.norm, *(t for pair in self.rotary if pair for t in pair)]
        tensors += [tensor for layer in self.layers for tensor in layer.values()]
        return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())

    @torch.no_grad()
    def _take(self, model: PreTrainedModel) -> None:
        for packed, parts in zip(self.layers, _all_layer_parts(model, self), strict=True):
            for name, target in packed.items():
                _fill(target, parts[name])
        _fill(self.embeddings, _packed(model.get_input_embeddings().weight))
        _fill(self.head, _packed(model.lm_head.weight))
        _fill(self.norm, _packed(model.model.norm.weight))
        for old, new in zip(self.rotary, self._rotary_tables(model), strict=True):
            for target, table in zip(old or (), new or (), strict=True):
                target.copy_(table)

    def _empty(self, packed: Packed) -> torch.Tensor:
        first = next(part for part in packed.parts if part is not None)
        dtype = torch.promote_types(self.dtype, torch.float32) if packed.exact else self.dtype
        if self.share and len(packed.parts) == 1 and first.dtype == dtype and first.is_contiguous():
            return first.detach()
        return torch.empty(sum(packed.rows), *first.shape[1:], dtype=dtype, device=self.device)

    @torch.no_grad()
    def _rotary_tables(self, model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """The model's own cosines and sines, in the type its layers would see at this precision."""
        rotary = model.model.rotary_emb
        like = torch.empty(0, dtype=self.dtype, device=model.device)
        made = rotary(like, torch.arange(self.positions, device=model.device)[None])
        # The upcycled decoder gives one pair for each selection of frequencies, others one pair for all layers.
        made = made if isinstance(made, list) else [made]
        groups = getattr(rotary, "groups", [0] * len(self.kinds))
        pairs = [tuple(table[0].to(self.device).contiguous() for table in pair) for pair in made]
        return [None if group is None else pairs[group] for group in groups]


def _architecture(model: PreTrainedModel) -> dict[str, Any]:
    if reason := unsupported(model):
        raise StageError(
            f"the decoder does not support {reason}", where=WHERE, fix="generate with transformers: model.generate(…)"
        )
    return normalise(model.config.to_dict())


def _all_layer_parts(model: PreTrainedModel, weights: DecoderWeights) -> list[dict[str, Packed]]:
    result = []
    for index, (layer, kind) in enumerate(zip(model.model.layers, weights.kinds, strict=True)):
        parts = _MIXER_PARTS[kind](layer.self_attn, weights.arch, index)
        parts |= _mlp_parts(layer.mlp)
        parts["input_norm"] = _packed(layer.input_layernorm.weight)
        parts["post_norm"] = _packed(layer.post_attention_layernorm.weight)
        result.append(parts)
    return result


def _full_parts(mixer: nn.Module, arch: Mapping[str, Any], index: int) -> dict[str, Packed]:
    """qkv [(H + 2G) d, D], o [D, H d], their biases, q_norm and k_norm [d]."""
    parts = _linear("qkv", mixer.q_proj, mixer.k_proj, mixer.v_proj) | _linear("o", mixer.o_proj)
    if arch["qk_norm"]:
        parts |= {"q_norm": _packed(mixer.q_norm.weight), "k_norm": _packed(mixer.k_norm.weight)}
    return parts


def _latent_parts(mixer: nn.Module, arch: Mapping[str, Any], index: int) -> dict[str, Packed]:
    """q_kv [H (d_n + d_r) + r + d_r, D] or, with a query rank, [r_q + r + d_r, D] and q_b; to_key, to_value; o.

    With QK-norm, q_k [H d + G d, D] (or [r_q + G d, D]), kv [r + d_r, D + G d], q_map [G, d_n + d_r, d] in its place.
    """
    first = mixer.q_proj if per_layer(arch["q_lora_rank"], index) is None else mixer.q_a_proj
    if arch["qk_norm"]:
        parts = _linear("q_k", first, mixer.k_proj) | _linear("kv", mixer.kv_a_proj_with_mqa)
        parts |= {"head_q_norm": _packed(mixer.q_norm.weight), "head_k_norm": _packed(mixer.k_norm.weight)}
        parts |= {"q_map": _packed(mixer.q_map)}
    else:
        parts = _linear("q_kv", first, mixer.kv_a_proj_with_mqa)
    parts |= _linear("o", mixer.o_proj)
    if hasattr(mixer, "q_b_proj"):
        parts |= _linear("q_b", mixer.q_b_proj)
    heads = mixer.kv_b_proj.weight.unflatten(0, (arch["num_attention_heads"], -1))  # [H, d_n + d_v, r]
    to_key, to_value = heads.split((arch["qk_nope_head_dim"], arch["v_head_dim"]), dim=1)
    parts |= {"to_key": _packed(to_key), "to_value": _packed(to_value)}
    if arch["qk_latent_layernorm"]:
        parts["kv_norm"] = _packed(mixer.kv_a_layernorm.weight)
        if hasattr(mixer, "q_a_layernorm"):
            parts["q_norm"] = _packed(mixer.q_a_layernorm.weight)
    return parts


def _mlp_parts(mlp: nn.Module) -> dict[str, Packed]:
    """gate_up [2I, D], down [D, I] and their biases."""
    return _linear("gate_up", mlp.gate_proj, mlp.up_proj) | _linear("down", mlp.down_proj)


def _state_parts(mixer: nn.Module, arch: Mapping[str, Any], index: int) -> dict[str, Packed]:
    """in [2 H d + 2 G d + H, D], out [D, H d], their biases; taps [C, 1, K], taps_bias [C]; norm [H d]; b_norm, c_norm
    [d]; and in fp32 a, step_bias, skip [H]."""
    parts = _linear("in", mixer.in_proj) | _linear("out", mixer.out_proj)
    parts |= {"taps": _packed(mixer.conv1d.weight), "taps_bias": _packed(mixer.conv1d.bias)}
    if arch["mamba_norm"]:
        parts["norm"] = _packed(mixer.norm.weight)
    if arch["qk_norm"]:
        parts |= {"b_norm": _packed(mixer.b_norm.weight), "c_norm": _packed(mixer.c_norm.weight)}
    exact = {"a": -torch.exp(mixer.A_log.detach()), "step_bias": mixer.dt_bias, "skip": mixer.D}
    return parts | {name: _packed(tensor, exact=True) for name, tensor in exact.items()}


_MIXER_PARTS = {"full_attention": _full_parts, "latent_attention": _latent_parts, "mamba2": _state_parts}


def _packed(tensor: torch.Tensor, exact: bool = False) -> Packed:
    return Packed((tensor,), (tensor.shape[0],), exact)


def _linear(name: str, *modules: nn.Module) -> dict[str, Packed]:
    """The weights of projections of one input, stacked, and `NAME_bias` if any has one."""
    rows = tuple(module.weight.shape[0] for module in modules)
    parts = {name: Packed(tuple(module.weight for module in modules), rows)}
    if any(module.bias is not None for module in modules):
        parts[f"{name}_bias"] = Packed(tuple(module.bias for module in modules), rows)
    return parts


def _fill(target: torch.Tensor, packed: Packed) -> None:
    for piece, part in zip(target.split(packed.rows), packed.parts, strict=True):
        if part is None:
            piece.zero_()
        elif piece.data_ptr() != part.data_ptr():  # else it is shared
            piece.copy_(part)
