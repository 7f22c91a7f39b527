"""How a step is split into micro-batches is no part of its result: losses, gradient norms and weights are the same."""

from __future__ import annotations

import pytest
from distillation_world import context, outcome, uneven, world

__all__ = ["context", "uneven", "world"]  # fixtures

# float32, so that the teacher's rounding to a coarser type does not turn an ulp into a step.
TEACHERS = {"live": {}, "cached": {"teacher_cache": {"top_k": 16, "dtype": "float32"}}}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("reduction", ["token_mean", "batch_sum"])
def test_micro_batches_give_the_same_losses_and_weights(context, uneven, packing, reduction, teacher):
    """Rows and steps hold different numbers of tokens and labels, so that a mean of means would differ."""
    # AdamW divides by |g| near zero: a larger epsilon keeps rounding from being blown up to whole steps.
    common = {"data": uneven, "packing": packing, "reduction": reduction, "ce_weight": 0.3, "adam_epsilon": 1e-3}
    common |= {"max_steps": 3, **TEACHERS[teacher]}
    runs = [outcome(context(f"m{size}", micro_batch_size=size, **common)) for size in (1, 2, 4)]
    first_weights, first_history, first_result = runs[0]
    assert len(first_history) == 3 and first_history[1]["grad_norm"] > 1e-2
    for weights, history, result in runs[1:]:
        assert result["tokens"] == first_result["tokens"]
        assert ("teacher_top_k_mass" in result) == (teacher == "cached")
        assert result.get("teacher_top_k_mass", 0) == pytest.approx(first_result.get("teacher_top_k_mass", 0), rel=1e-6)
        for row, first in zip(history, first_history, strict=True):
            assert all(row[name] == pytest.approx(first[name], rel=1e-6) for name in ("loss", "kl", "ce"))
            assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
        for name, tensor in first_weights.items():
            assert (weights[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_adapters_too(context, uneven, packing):
    common = {"data": uneven, "packing": packing, "adam_epsilon": 1e-3, "max_steps": 3, "lora": {"r": 4}}
    whole, parts = (outcome(context(f"m{size}", micro_batch_size=size, **common)) for size in (4, 1))
    assert max((whole[0][name] - parts[0][name]).abs().max() for name in whole[0]) <= 1e-6
    for row, other in zip(whole[1], parts[1], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
