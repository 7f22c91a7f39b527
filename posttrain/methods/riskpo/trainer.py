"""RiskPO on the shared policy trainer: advantages of a risk measure, a tracker that checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from posttrain.errors import StageError
from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.methods.riskpo.difficulty import PassRates, kind_of
from posttrain.methods.riskpo.estimator import risk_advantages
from posttrain.methods.riskpo.quantiles import make_tracker
from posttrain.policy.data import ROW
from posttrain.policy.trainer import QUESTION, PolicyTrainer

COMPARE_EVERY = 100
"""Roll-out batches between two looks at whether all ranks track the same quantiles."""


class RiskpoTrainer(PolicyTrainer):
    """`PolicyTrainer` whose advantages are those of `risk_advantages`, computed alike on every rank."""

    config: RiskpoConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        risk = self.config.risk
        self.tracker, self.pass_rates = make_tracker(risk), PassRates()
        self.columns = [self.names.index(name) for name in self.config.risk_rewards]
        self.shaping = [at for at in range(len(self.names)) if at not in self.columns]

    def advantages_of(self, rewards: Tensor) -> Tensor:
        weights = self.reward_weights.double()
        groups = rewards.double().cpu().view(-1, self.num_generations, len(self.names))  # [Q, G, rewards]
        rollout = self.state.global_step // self.config.steps_per_rollout
        scores, kinds = weighted(groups[..., self.columns], weights[self.columns]), self._kinds(rollout)
        difficulty = self.pass_rates.difficulty(kinds)
        found = risk_advantages(
            scores, self.config.risk, self.tracker, seed=self.ctx.seed, step=rollout, difficulty=difficulty
        )
        self.pass_rates.update(kinds, scores.nanmean(1))
        for name, value in found.metrics.items():
            self._metrics["train"][f"risk/{name}"].append(value)
        if rollout % COMPARE_EVERY == 0:
            self._compare_ranks()
        shaped = centred(weighted(groups[..., self.shaping], weights[self.shaping])) if self.shaping else 0.0
        return (found.advantages.double() + shaped).flatten().float()

    def stage_state(self) -> dict[str, Any]:
        own = {"tracker": self.tracker.state_dict(), "pass_rates": self.pass_rates.state_dict()}
        return {**super().stage_state(), **own}

    def load_stage_state(self, state: dict[str, Any]) -> None:
        super().load_stage_state(state)
        self.tracker.load_state_dict(state["tracker"])
        self.pass_rates.load_state_dict(state["pass_rates"])

    def _kinds(self, rollout: int) -> list[str]:
        """Of the questions of a batch, in the order of the gathered rewards; every rank has all rows."""
        first = rollout * self.config.questions_per_batch
        asked = self.train_dataset[first : first + self.config.questions_per_batch][QUESTION]
        return [kind_of(json.loads(row)) for row in self.prompts.rows[asked][ROW]]

    def _compare_ranks(self) -> None:
        """Raises StageError: the ranks' trackers have come apart, and with them their advantages."""
        mine = hashlib.sha256(json.dumps(self.tracker.state_dict(), sort_keys=True).encode()).hexdigest()
        if self.ctx.same(mine) != mine:
            raise StageError(
                f"rank {self.ctx.rank} tracks other quantiles than the first: the ranks saw different rewards",
                where=f"stages.{self.ctx.name}",
                fix="resume the run; if it comes again, a reward gives different scores for the same answer",
            )


def weighted(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over the last axis; what is missing counts 0, and NaN where all is missing."""
    total = (scores * weights).nansum(-1)
    return total.masked_fill(torch.isnan(scores).all(-1), float("nan"))


def centred(scores: Tensor) -> Tensor:
    """Scores `[Q, G]` less their question's mean; 0 where there is none."""
    return (scores - scores.nanmean(-1, keepdim=True)).nan_to_num(nan=0.0)
