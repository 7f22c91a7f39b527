"""Stages in random orders: the legal ones are planned, the others are refused with the reason."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from stage_orders import FAULTS, TRAINING, Pipeline, illegal, legal

from posttrain.config import load_recipe
from posttrain.errors import RecipeError
from posttrain.models.architecture import mixers
from posttrain.pipeline.plan import make_plan

SETTINGS = ["datasets.pairs.gym.size=24", "datasets.problems.gym.size=40", "datasets.problems.gym.difficulty=[0]"]


def planned(line: Pipeline, folder: Path):
    file = folder / "drawn.yaml"
    file.write_text(yaml.safe_dump(line.recipe(), sort_keys=False), encoding="utf-8")
    return make_plan(load_recipe(str(file), [f"paths.outputs={folder}", *SETTINGS]))


@pytest.mark.parametrize("seed", range(20))
def test_legal_orders_are_planned(seed: int, tmp_path: Path) -> None:
    line = legal(seed)
    plan = planned(line, tmp_path)
    assert {stage.name for stage in plan.stages} >= set(line.stages)
    for reference, kind in line.kinds.items():
        name = reference.partition(".")[0]
        if name == "model":
            continue
        found = set(mixers(plan[name].outputs["model"].architecture))
        expected = {"full": {"full_attention"}, "latent": {"latent_attention"}, "state": {"mamba2"}}
        assert found == expected[kind] if kind != "hybrid" else ("mamba2" in found and len(found) == 2)


@pytest.mark.parametrize("seed", range(30))
def test_illegal_orders_are_refused_with_the_reason(seed: int, tmp_path: Path) -> None:
    line, fault, reason = illegal(seed)
    with pytest.raises(RecipeError) as caught:
        planned(line, tmp_path)
    said = str(caught.value)
    assert re.search(reason, said), f"{fault}: {said}"
    assert all(problem.fix for problem in caught.value.problems), said


def test_the_draws_cover_what_they_are_for() -> None:
    types = Counter(stage["type"] for seed in range(20) for stage in legal(seed).stages.values())
    assert set(types) >= {*TRAINING, "mla_upcycle", "hybrid_init", "layer_select", "assemble", "evaluate", "export"}
    layouts = {s["to"] for seed in range(20) for s in legal(seed).stages.values() if s["type"] == "export"}
    assert layouts == {"native", "falcon_h1"}
    assert {illegal(seed)[1] for seed in range(30)} == {fault.__name__ for fault in FAULTS}
