"""What a plan says of caches that hold constant states: both figures, since papers print the smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from posttrain.models.architecture import cache_bytes_per_token, cache_ratios_at, cache_state_bytes
from posttrain.pipeline.stage import ArtifactMeta, Estimate


def with_states(
    estimate: Estimate, outputs: Mapping[str, ArtifactMeta], inputs: Mapping[str, ArtifactMeta]
) -> Estimate:
    """The estimate with the constant bytes of the model's cache, and a note where the stage changes them."""
    made = _architecture(outputs) or (_architecture(inputs) if estimate.cache_bytes_per_token is not None else None)
    if made is None or not (constant := cache_state_bytes(made)):
        return estimate
    before = [one.architecture for one in inputs.values() if one.architecture is not None]
    if any(other.get("mixers") == made.get("mixers") for other in before):
        return replace(estimate, cache_state_bytes=constant)
    return replace(estimate, cache_state_bytes=constant, notes=(*estimate.notes, _note(made, constant)))


def _architecture(metas: Mapping[str, ArtifactMeta]) -> dict[str, Any] | None:
    return next((one.architecture for one in metas.values() if one.architecture is not None), None)


def _note(arch: Mapping[str, Any], constant: int) -> str:
    without, with_states = cache_ratios_at(arch)
    lengths = ", ".join(f"{ratio:.1%} at {length // 1024}k" for length, ratio in with_states.items())
    return (
        f"cache: {cache_bytes_per_token(arch):,} B a token and {constant / 1e6:.2f} MB a sequence, states in fp32: "
        f"{without:.2%} of plain attention's without the states (what papers print); with them {lengths} tokens"
    )
