"""freqfold=search: the error it minimises is the mean over drawn queries and keys, and it takes the least of it."""

from __future__ import annotations

import pytest
import torch
from methods.mla_upcycling import reference
from methods.mla_upcycling.sources import make_source
from methods.mla_upcycling.test_mla_exactness import calibrate, converted_output, inputs, relative, shared_key_output

import posttrain.methods.mla_upcycling as mla
from posttrain.methods.mla_upcycling import freqfold, rotary

GROUPS, WIDTH = 2, 16


def moments(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(GROUPS + 1, GROUPS * WIDTH, GROUPS * WIDTH, generator=generator, dtype=torch.float64)
    keys = roots[0] @ roots[0].T
    queries = torch.stack([root[:WIDTH] @ root[:WIDTH].T for root in roots[1:]])
    return keys, queries


def test_candidates_double_from_the_smallest() -> None:
    assert freqfold.candidates(64, 16) == [4, 8, 16, 32]
    assert freqfold.candidates(16, 16) == [1, 2, 4, 8]


@pytest.mark.parametrize("fold", [2, 4, 8])
def test_the_error_is_that_of_drawn_scores(fold: int) -> None:
    keys, queries = moments()
    frequencies = 0.6 ** torch.arange(WIDTH // 2).double()
    key_map, query_map = rotary.folded_maps(keys, GROUPS, fold, fold // 2)
    generator, count = torch.Generator().manual_seed(1), 40_000
    lost = total = 0.0
    k = torch.randn(count, GROUPS * WIDTH, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(keys).T
    for group in range(GROUPS):
        noise = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        q = noise @ torch.linalg.cholesky(queries[group]).T
        own, shared, mine = k.unflatten(1, (GROUPS, WIDTH))[:, group], k @ key_map.T, q @ query_map[group].T
        for distance in freqfold.DISTANCES:
            at = torch.full((count,), float(distance), dtype=torch.float64)
            source = (q * reference.turn(own, frequencies, at)).sum(1)
            turned = (mine * (reference.turn(shared, frequencies[::2], at) - shared)).sum(1)
            lost += (source - (q * own).sum(1) - turned).square().sum().item()
            total += source.square().sum().item()
    found = freqfold.score_error((key_map, query_map), keys, queries, frequencies)
    assert found == pytest.approx((lost / total) ** 0.5, rel=0.02)


def test_nothing_is_lost_where_nothing_turns_or_everything_is_kept() -> None:
    keys, queries = moments()
    maps = rotary.folded_maps(keys, GROUPS, 2, 1)
    assert freqfold.score_error(maps, keys, queries, torch.zeros(WIDTH // 2).double()) < 1e-9
    assert freqfold.score_error(maps, keys, queries, torch.ones(WIDTH // 2).double()) > 0.1


def test_captured_energy_is_no_guide() -> None:
    """Folding always captures more key energy; where distant frequencies differ its scores may still be worse."""
    keys, queries = moments()
    frequencies = 0.3 ** torch.arange(WIDTH // 2).double()
    maps = {fold: rotary.folded_maps(keys, GROUPS, fold, fold // 2) for fold in (2, 8)}
    energies = {fold: ((key @ keys) * key).sum().item() for fold, (key, _) in maps.items()}
    errors = {fold: freqfold.score_error(found, keys, queries, frequencies) for fold, found in maps.items()}
    assert energies[8] > energies[2]
    best, all_errors = freqfold.best_fold(keys, queries, frequencies, 8)
    assert all_errors[best] == min(all_errors.values()) and all_errors[2] == errors[2]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_plan_takes_the_best_fold_of_every_layer(family: str) -> None:
    model = make_source(family)
    cfg = {"kv_lora_rank": 60, "qk_rope_head_dim": 4, "rotary_plan": "rorope"}
    statistics = calibrate(model)
    plan = mla.build_plan(model, {**cfg, "freqfold": "search"}, statistics)
    for index, layer in enumerate(plan.layers):
        errors = layer.summary["score_errors"]
        assert list(errors) == ["4", "8"] and errors[str(layer.summary["freqfold"])] == min(errors.values())
        fixed = mla.build_plan(model, {**cfg, "freqfold": layer.summary["freqfold"]}, statistics).layers[index]
        assert torch.equal(layer.rotary_key, fixed.rotary_key)
    x = inputs(model)
    assert relative(converted_output(model, plan, x), shared_key_output(model, plan, x)) < 1e-4
