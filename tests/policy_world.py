"""A tiny policy, questions, and rewards that need no processes: trainers of `grpo` and `riskpo` in milliseconds."""

from __future__ import annotations

import atexit
import gc
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from source_models import make_source

from posttrain.methods.grpo import GrpoConfig
from posttrain.methods.riskpo.config import RiskpoConfig
from posttrain.methods.riskpo.trainer import RiskpoTrainer
from posttrain.models.tiny import tiny_tokenizer
from posttrain.pipeline.context import StageContext
from posttrain.policy.config import PolicyConfig
from posttrain.policy.data import PROMPT, ROW, Prompts
from posttrain.policy.trainer import PolicyTrainer
from posttrain.rewards.score import COUNTS, Scores

# accelerate collects garbage before every training: a second in a process that has imported all this.
gc.freeze()
atexit.register(gc.unfreeze)

QUESTIONS = 12
ENDS = [*range(60), 257]
"""Tokens that end a completion: of a random policy's about one in five, so that completions differ in length."""

SMALL: dict[str, Any] = {
    "max_steps": 3,
    "num_generations": 4,
    "generation_batch_size": 16,
    "micro_batch_size": 4,
    "max_prompt_length": 64,
    "max_completion_length": 8,
    "lr": 1e-2,
    "save_seconds": 0,
    "rewards": {"correct": {"type": "math"}},
}
KINDS: dict[str, tuple[type[PolicyConfig], type[PolicyTrainer], dict[str, Any]]] = {
    "grpo": (GrpoConfig, PolicyTrainer, {}),
    "riskpo": (RiskpoConfig, RiskpoTrainer, {"risk": {"bundle_size": 2}}),
    "neutral": (RiskpoConfig, RiskpoTrainer, {"preset": "neutral"}),
}

Score = Callable[[str, str, dict[str, Any], int], dict[str, float | None]]


def by_chance(prompt: str, completion: str, row: dict[str, Any], length: int) -> dict[str, float | None]:
    """Right for about four of ten completions, the same ones wherever and whenever they are scored."""
    return {"correct": float(zlib.crc32(f"{prompt}|{completion}".encode()) % 10 < 4)}


class ScriptedRewards:
    """Stands for a `RewardSet`; remembers what it was asked."""

    def __init__(self, score: Score = by_chance) -> None:
        self.of = score
        self.asked: list[list[tuple[str, str]]] = []

    def score(self, prompts: Any, completions: Any, rows: Any, lengths: Any, at_score: Any = None) -> Scores:
        self.asked.append(list(zip(prompts, completions, strict=True)))
        found = [self.of(*one) for one in zip(prompts, completions, rows, lengths, strict=True)]
        counts = {**dict.fromkeys(COUNTS, 0), "parse_failures": sum(0.0 in one.values() for one in found)}
        return Scores({name: [one[name] for one in found] for name in found[0]}, counts)


def make_policy(**changes: Any) -> Any:
    model = make_source("llama", **{"attn_implementation": "sdpa", "initializer_range": 0.05, **changes})
    model.generation_config.eos_token_id = list(ENDS)
    return model


def make_prompts(count: int = QUESTIONS) -> Prompts:
    """Questions of different length and of seven kinds."""
    tokenizer = tiny_tokenizer()
    rows = [
        {
            PROMPT: f"q{number} " + "x" * (number % 5),
            ROW: json.dumps({"id": str(number), "task": {"name": f"kind{number % 7}", "difficulty": 0}}),
        }
        for number in range(count)
    ]
    return Prompts(Dataset.from_list(rows), {row[PROMPT]: tokenizer(row[PROMPT])["input_ids"] for row in rows})


def make_trainer(
    kind: str,
    folder: Path,
    *,
    model: Any = None,
    score: Score = by_chance,
    cls: type[PolicyTrainer] | None = None,
    ctx: dict[str, Any] | None = None,
    questions: int = QUESTIONS,
    **settings: Any,
) -> Any:
    """A trainer on a context in `folder`. `ctx`: further fields of the context."""
    config_class, trainer_class, defaults = KINDS[kind]
    bound = {"epsilon_high": 5.0} if settings.get("loss_type") == "cispo" else {}
    config = config_class(**{**SMALL, **bound, **defaults, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    context = StageContext("rl", config, folder, **{"seed": 3, "device": "cpu", **(ctx or {})})
    return (cls or trainer_class)(
        context,
        config,
        make_policy() if model is None else model,
        tiny_tokenizer(),
        make_prompts(questions),
        ScriptedRewards(score),
    )


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights with the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def column(history: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in history]


class Recorder:
    """Mixed into a trainer: what every roll-out batch and every forward pass was made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.written: list[Any] = []
        self.batches: list[dict[str, Any]] = []
        self.micro: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._generate_single_turn(*args, **kwargs)
        self.written.append(found)
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        self.batches.append(
            {name: value.clone() for name, value in found.items()} | {"step": self.state.global_step, "inputs": inputs}
        )
        return found

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        rows = {name: inputs[name].detach().clone() for name in ("completion_ids", "advantages", "completion_mask")}
        self.micro.append({**rows, "loss": float(loss.detach()), "step": self.state.global_step})
        return loss


def asked_rows(trainer: Any) -> Any:
    """The questions of a trainer's run, in order, as a table that TRL's own trainer could take."""
    return trainer.prompts.rows.select(trainer.train_dataset["question"])
