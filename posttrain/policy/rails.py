"""What to look at while a policy learns, and warnings that say what to do: no arm of a run goes wrong unseen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from posttrain.pipeline.context import StageContext
from posttrain.policy.config import PolicyConfig

log = logging.getLogger(__name__)

PATIENCE = 5
"""Roll-out batches in a row before what may be chance is called a trend."""


class Rails:
    """Metrics of rewards beside TRL's, and alarms over all of them; each alarm is raised once.

    Args:
        deciding: numbers of the rewards that judge whether an answer is right; none: all rewards count.

    Attributes:
        alarms: what was raised so far: step, name and sentence.
    """

    def __init__(self, ctx: StageContext, config: PolicyConfig, deciding: list[int]) -> None:
        self.where = f"stages.{ctx.name}"
        self.said = ctx.rank == 0
        self.completions = config.generation_batch_size
        self.longest = config.max_completion_length
        self.deciding = deciding
        self.alarms: list[dict[str, Any]] = []
        self._first: dict[str, float] = {}
        self._streaks: dict[str, int] = {}

    def rewards(self, groups: Tensor, counts: Mapping[str, int]) -> dict[str, float]:
        """Metrics of a batch: questions that teach nothing, and answers that could not be judged.

        Args:
            groups: scores `[Q, G, rewards]`, NaN where there is none.
            counts: of answers that were unreadable, late and the like, over all ranks.
        """
        scores = groups[..., self.deciding or slice(None)].double().nansum(-1)
        scores = scores.masked_fill(torch.isnan(groups).all(-1), float("nan"))
        low, high = _nan_min(scores), -_nan_min(-scores)
        flat = low == high
        found = {
            "questions/zero_variance": float(flat.double().mean()),
            "questions/all_wrong": float((flat & (high <= 0)).double().mean()),
            "questions/all_right": float((flat & (low > 0)).double().mean()),
        }
        return found | {f"answers/{name}": count / self.completions for name, count in counts.items()}

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raise the alarms of a step's metrics."""
        for name, (holds, sentence) in self._signs(metrics).items():
            self._streaks[name] = self._streaks.get(name, 0) + 1 if holds else 0
            if self._streaks[name] >= PATIENCE and all(alarm["name"] != name for alarm in self.alarms):
                self.alarms.append({"step": step, "name": name, "what": sentence})
                if self.said:
                    log.warning("%s, step %d: %s", self.where, step, sentence)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to raise the same alarms; JSON-able."""
        return {"first": self._first, "streaks": self._streaks, "alarms": self.alarms}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._first, self._streaks = dict(state["first"]), dict(state["streaks"])
        self.alarms = list(state["alarms"])

    def _signs(self, metrics: Mapping[str, float]) -> dict[str, tuple[bool, str]]:
        """For each alarm whose metrics are there: whether its sign is seen now, and what it means."""
        signs: dict[str, tuple[bool, str]] = {}
        if (entropy := metrics.get("entropy")) is not None:
            first = self._first.setdefault("entropy", entropy)
            moved = f"entropy went from {first:.3g} to {entropy:.3g} nats a token"
            signs["entropy_collapse"] = (
                entropy < 0.1 * first,
                f"{moved}: completions are all alike; lower lr, raise entropy_coef, or set beta",
            )
            signs["entropy_blow_up"] = (
                entropy > 2 * first + 1,
                f"{moved}: the policy falls apart; lower lr, or look at completions/clipped_ratio",
            )
        if (clipped := metrics.get("completions/clipped_ratio")) is not None:
            signs["cut_off"] = (
                clipped > 0.5,
                f"{clipped:.0%} of the completions are cut off at max_completion_length={self.longest}: raise it, or "
                "set mask_truncated_completions=true",
            )
        if (flat := metrics.get("questions/zero_variance")) is not None:
            wrong = metrics.get("questions/all_wrong", 0.0)
            remedy = "easier questions, or a longer sft before" if wrong > flat / 2 else "harder questions"
            signs["no_signal"] = (
                flat > 0.9,
                f"{flat:.0%} of the questions teach nothing ({wrong:.0%} are always answered wrongly): {remedy}",
            )
        if (unread := metrics.get("answers/parse_failures")) is not None:
            signs["no_answer"] = (
                unread > 0.5,
                f"no final answer is found in {unread:.0%} of the completions: teach the format first (sft), or set "
                "`answer` to the format that the model writes",
            )
        if (gap := metrics.get("rollout/logprob_gap")) is not None:
            first = self._first.setdefault("rollout/logprob_gap", gap)
            signs["sampler_differs"] = (
                gap > max(3 * first, 0.05),
                f"sampler and trainer differ by {gap:.3g} nats a token ({first:.3g} at first): the completions are not "
                "the policy's own; rollout_dtype=float32, or another rollout",
            )
        return signs


def _nan_min(values: Tensor) -> Tensor:
    """Smallest number of each row; a row without numbers gives infinity."""
    return values.nan_to_num(nan=float("inf")).amin(-1)
