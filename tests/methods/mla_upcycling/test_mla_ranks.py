"""Ranks from spectra: the energy rule at its boundary, and water filling against every other way to spend a budget."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from source_models import make_source

import posttrain.methods.mla_upcycling as mla
from posttrain.methods.mla_upcycling.ranks import energy_rank, water_fill


def test_card_verification_7_energy_rule_at_the_boundary() -> None:
    """Known spectrum, cumulative shares 0.5, 0.75, 0.875, 1."""
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert [energy_rank(spectrum, delta) for delta in (0.4, 0.5, 0.51, 0.75, 0.76, 1.0)] == [1, 1, 2, 2, 3, 4]
    released = [energy_rank(spectrum, delta, rule="released") for delta in (0.4, 0.5, 0.51, 0.75, 0.76, 1.0)]
    assert released == [1, 1, 1, 2, 2, 4]
    assert energy_rank(torch.ones(100), 0.095, multiple=8) == 16, "rounded up"
    assert energy_rank(torch.ones(12), 0.9, multiple=8) == 12, "never beyond the spectrum"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total", [12, 18, 25])
def test_water_filling_loses_the_least(seed: int, total: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [(torch.rand(12, generator=generator).double() ** power).sort(descending=True)[0] for power in (1, 4, 9)]

    def lost(ranks: tuple[int, ...] | list[int]) -> float:
        return sum((s[rank:].sum() / s.sum()).item() for s, rank in zip(spectra, ranks, strict=True))

    found = water_fill(spectra, total, multiple=4)
    others = [ranks for ranks in product((4, 8, 12), repeat=3) if sum(ranks) <= total]
    assert sum(found) <= total and all(rank % 4 == 0 and rank > 0 for rank in found)
    assert lost(found) == pytest.approx(min(map(lost, others)), abs=1e-12)


def test_a_budget_below_one_multiple_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 4 for each of 2"):
        water_fill([torch.ones(8), torch.ones(8)], 7, 4)


def test_budgets_give_ranks_per_layer_that_the_model_has() -> None:
    model = make_source("llama")
    with torch.no_grad():  # one layer with a steep spectrum: it needs less
        model.model.layers[0].self_attn.v_proj.weight[2:] *= 1e-3
        model.model.layers[0].self_attn.k_proj.weight[2:] *= 1e-3
    base, layers = {"qk_rope_head_dim": 8, "rank_multiple": 4}, model.config.num_hidden_layers
    new, report = mla.upcycle(model, {**base, "bytes_per_token": 2 * layers * (8 + 16)})
    ranks = [layer["kv_lora_rank"] for layer in report["layers"]]
    assert ranks[0] < 16 < max(ranks) and sum(ranks) == 16 * layers and new.config.kv_lora_rank == ranks
    assert report["kv_ratio"] == pytest.approx((16 + 8) / 64)
    kept = mla.upcycle(model, {**base, "energy": 0.9})[1]["layers"]
    assert all(layer["energy"] >= 0.9 for layer in kept) and kept[0]["kv_lora_rank"] < kept[1]["kv_lora_rank"] < 56
