"""The plan of a conversion: everything `apply_plan` needs besides the source weights; JSON and safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.methods.mla_upcycling.shape import MlaShape

FORMAT = 1
TENSORS = ("key_weights", "query_weights", "encode", "decode", "latent_offset")


@dataclass(frozen=True)
class LayerPlan:
    """One layer. G KV heads, n = d_r/2 pairs, r latent rank; float32, `latent_offset` float64.

    Attributes:
        key_weights: [n, G], shared key k_r,l = sum_g key_weights[l, g] k_{g,l}.
        query_weights: [n, G], rotary query of head h: query_weights[l, g(h)] q_{h,l}.
        encode: [r, 2·G·d_h], latent from un-repeated pre-RoPE [keys ; values].
        decode: [G·(d_n + d_v), r], position-free keys then values from the latent; rows by part, head, row.
        latent_offset: [r], latent of the mean position-free key, subtracted from the latent; zero without biases.
        summary: numbers for the report, JSON-able.
    """

    key_weights: Tensor
    query_weights: Tensor
    encode: Tensor
    decode: Tensor
    latent_offset: Tensor
    summary: dict[str, Any]

    @property
    def rank(self) -> int:
        return self.encode.shape[0]


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

    def save(self, folder: Path) -> None:
        """Write `conversion.json` and `plan.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"layers.{index}.{name}": getattr(layer, name).contiguous().cpu()
            for index, layer in enumerate(self.layers)
            for name in TENSORS
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
        shape = report.pop("shape")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}
        tensors, summaries = load_file(folder / "plan.safetensors"), report.pop("layers")
        report.pop("kv_ratio")
        layers = tuple(
            LayerPlan(**{name: tensors[f"layers.{index}.{name}"] for name in TENSORS}, summary=summary)
            for index, summary in enumerate(summaries)
        )
        return cls(MlaShape(**fields), layers, report)
