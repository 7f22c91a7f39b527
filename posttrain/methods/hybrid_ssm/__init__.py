"""Replace attention layers of a pretrained decoder by state-space layers (Zebra-Llama, MambaInLlama)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "HybridConfig": "config",
    "HeadStatistics": "statistics",
    "collect_head_statistics": "statistics",
    "init_from_attention": "init",
    "hybridize": "convert",
    "assemble": "assembly",
    "SwapScorer": "scoring",
    "HybridInit": "init_stage",
    "HybridInitConfig": "config",
    "LayerSelect": "select_stage",
    "LayerSelectConfig": "config",
    "Assemble": "assemble_stage",
    "AssembleConfig": "config",
    "select_layers": "select",
    "is_feasible": "select",
    "count_feasible": "select",
    "layer_costs": "select",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
