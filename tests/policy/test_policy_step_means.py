"""Means over the tokens of a step do not depend on how they fell into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from policy_world import make_trainer

from posttrain.policy.step_means import StepMeans


def test_a_token_weighs_the_same_wherever_it_stands() -> None:
    means = StepMeans()
    means.add("entropy", torch.tensor([[1.0, 9.0]]), torch.tensor([[True, False]]))
    means.add("entropy", torch.tensor([[3.0, 5.0]]), torch.tensor([[True, True]]), largest=True)
    assert means.take() == {"entropy": 3.0, "entropy_max": 5.0}
    assert means.take() == {}


def test_a_step_without_tokens_has_a_mean_of_zero() -> None:
    means = StepMeans()
    means.add("gap", torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), largest=True)
    assert means.take() == {"gap": 0.0, "gap_max": 0.0}


@pytest.mark.parametrize("bonus", [{}, {"entropy_coef": 0.1}, {"top_entropy_quantile": 0.5}])
def test_the_logged_entropy_does_not_depend_on_the_micro_batch(bonus: dict[str, Any], tmp_path: Path) -> None:
    """And rows of like length share a forward pass only where nothing of TRL's is of a micro-batch."""
    found = {}
    for size in (2, 16):
        trainer = make_trainer("grpo", tmp_path / str(size), micro_batch_size=size, max_steps=1, **bonus)
        found[size] = trainer.fit()[0]
        assert trainer._sorts == (not bonus)
    for name in ("entropy", "rollout/logprob_gap", "rollout/logprob_gap_max"):
        assert found[2][name] == pytest.approx(found[16][name], rel=1e-4, abs=2e-6), name


def test_the_reference_model_is_made_fast_as_the_policy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from policy_world import make_policy

    reference = make_policy()
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *args, **kwargs: reference)
    trainer = make_trainer("grpo", tmp_path, beta=0.1)
    assert trainer.frozen == (trainer.ref_model,) and trainer.ref_model is reference
