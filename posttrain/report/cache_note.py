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
    """The estimate with the constant bytes of the model's cache, and a note where the stage changes them.

    A stage that states them itself (an export in classes that hold more) is left alone.
    """
    if estimate.cache_state_bytes is not None:
        return estimate
    made = _architecture(outputs) or (_architecture(inputs) if estimate.cache_bytes_per_token is not None else None)
    if made is None or not (constant := cache_state_bytes(made)):
        return estimate
    ratios = cache_ratios_at(made)
    estimate = replace(estimate, cache_state_bytes=constant, **ratios)
    before = [one.architecture for one in inputs.values() if one.architecture is not None]
    if any(_figures(other) == _figures(made) for other in before):
        return estimate
    note = f"cache: {cache_bytes_per_token(made):,} B a token and {constant:,} B a sequence, {ratios_text(ratios)}"
    return replace(estimate, notes=(*estimate.notes, note))


def ratios_text(figures: Mapping[str, Any]) -> str:
    """Both ratios of an estimate or of an evaluation's result."""
    lengths = figures["cache_ratio_with_states"].items()
    honest = ", ".join(f"{ratio:.1%} at {int(length) // 1024}k" for length, ratio in lengths)
    return (
        f"states in fp32: {figures['cache_ratio_without_states']:.2%} of plain attention's without the states "
        f"(what papers print); with them {honest} tokens"
    )


def _architecture(metas: Mapping[str, ArtifactMeta]) -> dict[str, Any] | None:
    return next((one.architecture for one in metas.values() if one.architecture is not None), None)


def _figures(arch: Mapping[str, Any]) -> tuple[int, int]:
    return cache_bytes_per_token(arch), cache_state_bytes(arch)
