"""The plan of a conversion: everything `apply_plan` needs besides the source weights; JSON and safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.methods.mla_upcycling.shape import MlaShape

FORMAT = 2
TENSORS = ("rotary_key", "rotary_query", "encode", "decode", "latent_offset")
OPTIONAL = ("query_encode", "query_decode")


@dataclass(frozen=True)
class LayerPlan:
    """One layer. G KV heads, r latent rank; float32, `latent_offset` float64.

    Attributes:
        rotary_key: [d_r, G·d_h], shared rotary key from un-repeated pre-RoPE keys; half-split rows.
        rotary_query: [G, d_r, d_h], rotary rows of a query head of group g from its pre-RoPE query.
        encode: [r, 2·G·d_h], latent from un-repeated pre-RoPE [keys ; values].
        decode: [G·(d_n + d_v), r], position-free keys then values from the latent; rows by part, head, row.
        latent_offset: [r], latent of the mean position-free key, subtracted from the latent; zero without biases.
            All of keys are normalised ones where the source has QK-norm.
        summary: numbers for the report, JSON-able.
        query_encode, query_decode: [r_q, H·d_h] and [H·d_h, r_q], the low-rank query from source queries without bias
            and back; None for a full query.
    """

    rotary_key: Tensor
    rotary_query: Tensor
    encode: Tensor
    decode: Tensor
    latent_offset: Tensor
    summary: dict[str, Any]
    query_encode: Tensor | None = None
    query_decode: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.encode.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The matrices that this layer has, by name."""
        found = {name: getattr(self, name) for name in (*TENSORS, *OPTIONAL)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class MlaPlan:
    """A whole conversion: the shape, one `LayerPlan` per layer, and how it was made (config, calibration tokens)."""

    shape: MlaShape
    layers: tuple[LayerPlan, ...]
    provenance: dict[str, Any]

    def report(self) -> dict[str, Any]:
        """JSON-able account of the plan: provenance, shape, and per layer rank, energy, errors and α."""
        return {
            "format": FORMAT,
            **self.provenance,
            "kv_ratio": sum(layer.rank + self.shape.qk_rope_head_dim for layer in self.layers)
            / (self.shape.source_elements * len(self.layers)),
            "shape": asdict(self.shape),
            "layers": [layer.summary for layer in self.layers],
        }

    def diff(self, other: MlaPlan) -> list[str]:
        """What differs, one readable line each; empty for equal plans.

        Matrices are compared by relative distance (Frobenius). Eigenvectors of equal eigenvalues may turn freely, so a
        distance between matrices need not mean another model.
        """
        lines = _changes(self.provenance, other.provenance) + _changes(
            asdict(self.shape), asdict(other.shape), "shape."
        )
        if len(self.layers) != len(other.layers):
            return [*lines, f"layers: {len(self.layers)} → {len(other.layers)}"]
        for index, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            lines += _changes(mine.summary, theirs.summary, f"layers.{index}.")
            names = [name for name in (*TENSORS, *OPTIONAL) if name in mine.tensors() | theirs.tensors()]
            lines += [f"layers.{index}.{name}: {change}" for name in names if (change := _distance(mine, theirs, name))]
        return lines

    def save(self, folder: Path) -> None:
        """Write `conversion.json` and `plan.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{index}.{name}": tensor.contiguous().cpu()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.tensors().items()
        }
        save_file(tensors, folder / "plan.safetensors")
        (folder / "conversion.json").write_text(json.dumps(self.report(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> MlaPlan:
        """Read what `save` wrote.

        Raises:
            ValueError: another format.
        """
        report = json.loads((folder / "conversion.json").read_text(encoding="utf-8"))
        if report.pop("format", None) != FORMAT:
            raise ValueError(f"{folder}: not a conversion plan of format {FORMAT}")
        shape = MlaShape.from_json(report.pop("shape"))
        tensors, summaries = load_file(folder / "plan.safetensors"), report.pop("layers")
        report.pop("kv_ratio")
        layers = tuple(
            LayerPlan(
                **{name: tensors[f"layers.{index}.{name}"] for name in TENSORS},
                **{name: tensors.get(f"layers.{index}.{name}") for name in OPTIONAL},
                summary=summary,
            )
            for index, summary in enumerate(summaries)
        )
        return cls(shape, layers, report)


def _changes(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name in sorted(mine.keys() | theirs.keys()):
        one, two = mine.get(name), theirs.get(name)
        if isinstance(one, dict) and isinstance(two, dict):
            lines += _changes(one, two, f"{prefix}{name}.")
        elif (list(one) if isinstance(one, tuple) else one) != (list(two) if isinstance(two, tuple) else two):
            lines.append(f"{prefix}{name}: {one} → {two}")
    return lines


def _distance(mine: LayerPlan, theirs: LayerPlan, name: str) -> str | None:
    one, two = getattr(mine, name), getattr(theirs, name)
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    one, two = one.double(), two.double()
    if one.shape != two.shape:
        return f"shape {list(one.shape)} → {list(two.shape)}"
    if one.equal(two):
        return None
    return f"relative distance {((one - two).norm() / one.norm().clamp_min(1e-30)).item():.3g}"
