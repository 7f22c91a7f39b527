"""scripts/hybrid_study.py: every arm is planned, differs in what its name says, sees as many tokens as the others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from posttrain.config import load_recipe
from posttrain.pipeline.plan import make_plan

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import hybrid_study  # noqa: E402

OPTIONS = argparse.Namespace(
    tokens=4096, ild_tokens=1024, step_tokens=512, needle="", words=["scale=smoke", "stages.distill.sequence_length=64"]
)


def planned(arm: str, folder: Path):
    words = hybrid_study.overrides(arm, 0.5, 3, OPTIONS)
    return make_plan(load_recipe("zebra_llama", [*words, f"paths.outputs={folder}"]))


@pytest.mark.parametrize("arm", hybrid_study.ARMS)
def test_every_arm_is_planned_with_the_same_tokens(arm: str, tmp_path: Path) -> None:
    found = planned(arm, tmp_path)
    stages = {stage.name: stage.cfg for stage in found.stages}
    trained = [stages[name] for name in ("align_state", "align_latent", "distill") if name in stages]
    assert sum(cfg.max_steps * cfg.tokens_per_step for cfg in trained) == 4096 + 2 * 1024
    assert ("align_state" in stages) == ("no_ild" not in arm)
    assert stages["state"].init == ("aligned" if "aligned_init" in arm else "published")
    assert stages["select"].method == (arm if arm in ("smart", "greedy_kl") else "uniform")
    assert found.resolved.frame.seed == 3
    assert not {"prefer", "datasets.pairs"} & set(stages)


def test_arms_share_what_they_have_in_common(tmp_path: Path) -> None:
    keys = {arm: {stage.name: stage.key for stage in planned(arm, tmp_path).stages} for arm in hybrid_study.ARMS}
    for name in ("model", "data", "latent", "align_latent", "state", "align_state"):
        assert keys["smart"][name] == keys["uniform"][name] == keys["greedy_kl"][name]
    assert len({keys[arm]["distill"] for arm in hybrid_study.ARMS}) == len(hybrid_study.ARMS)
