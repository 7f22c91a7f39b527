"""The part of an evaluation with problems: which are answered, the answers of both models, and the figures of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.data.chat import TEMPLATE_DATE, continued_text, plain_text
from posttrain.data.problems import ANSWER, prompt_of
from posttrain.data.tasks import TASK
from posttrain.errors import fail
from posttrain.methods.evaluation.answers import Answers, Problem, answer_problems
from posttrain.methods.evaluation.config import ProblemSettings
from posttrain.methods.evaluation.pass_at_k import pass_figures
from posttrain.pipeline.context import StageContext
from posttrain.pipeline.files import write_json, write_text

RIGHT = 1.0
"""Scores from here on mean a right answer."""


def find_problems(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, limit: float, cfg: ProblemSettings
) -> tuple[list[Problem], dict[str, int]]:
    """The first problems that the reward can score and whose answers fit, and how many rows were passed over for what.

    Raises StageError if there is none.
    """
    found: list[Problem] = []
    left_out = {"without": 0, "too_long": 0}
    for row in rows:
        if len(found) == cfg.max_problems:
            break
        if cfg.reward.needs and all(row.get(field) is None for field in cfg.reward.needs):
            left_out["without"] += 1
            continue
        prompt = prompt_of(row, "input `data` of an evaluate stage")
        text, special = continued_text(prompt, tokenizer, date_string=TEMPLATE_DATE)
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if len(ids) + cfg.max_new_tokens > limit:
            left_out["too_long"] += 1
            continue
        task = row.get(TASK) or {}
        asked = prompt if isinstance(prompt, str) else plain_text(prompt)
        found.append(
            Problem(len(found), str(row["id"]), task.get("name"), task.get("difficulty"), asked, ids, dict(row))
        )
    if not found:
        fields = " or ".join(f"`{field}`" for field in cfg.reward.needs) or "a prompt"
        fail(
            f"no problem to answer: {left_out['without']} rows have no {fields}, and {left_out['too_long']} leave no "
            f"room for {cfg.max_new_tokens} new tokens",
            where="problems",
            fix="choose data with right answers (data=reasoning_gym_rl), another problems.reward, or lower "
            "problems.max_new_tokens",
        )
    return found, left_out


class Measured:
    """Problems with the answers of every model, as figures and as files."""

    def __init__(
        self, problems: list[Problem], answers: dict[str, Answers], left_out: dict[str, int], ctx: StageContext
    ) -> None:
        self.cfg: ProblemSettings = ctx.config.problems
        self.bootstrap_samples, self.seed = ctx.config.bootstrap_samples, ctx.seed
        self.problems, self.answers = problems, answers
        # What cannot be scored for one model says nothing about either: pairs stay pairs.
        self.scored = [
            place
            for place in range(len(problems))
            if all(score is not None for found in answers.values() for score in found.scores[place])
        ]
        self.left_out = {**left_out, "unscorable": len(problems) - len(self.scored)}
        if not self.scored:
            fail(
                f"none of the answers to {len(problems)} problems could be scored by reward {self.cfg.reward.type}",
                where=f"stages.{ctx.name}.problems.reward",
                fix="look at the data's `answer` or `task`, or choose another reward",
            )

    def figures(self) -> dict[str, Any]:
        """The result metrics: pass@k over all problems flat, and `problems` with the settings, the rest and groups."""
        everything = self._pass(self.scored)
        flat: dict[str, Any] = {}
        for name, prefix in (("model", ""), ("baseline", "baseline_"), ("difference", "difference_")):
            flat |= {prefix + key: value for key, value in everything.get(name, {}).items()}
        settings = self.cfg.model_dump(mode="json", exclude={"pool"})
        detail = {
            "settings": settings,
            "problems": len(self.scored),
            "left_out": self.left_out,
            "answers": {name: found.figures for name, found in self.answers.items()},
            "by_task": self._groups("task"),
            "by_difficulty": self._groups("difficulty"),
        }
        return {**flat, "problems": detail}

    def write(self, folder: Path) -> None:
        """`problems.jsonl`, right answers of every problem, and `answers.json`, a few answers as text."""
        rows = []
        for place in self.scored:
            problem = self.problems[place]
            row = {"id": problem.id, "task": problem.task, "difficulty": problem.difficulty, "n": self.cfg.samples}
            rows.append({**row, "correct": {name: self._correct(name, place) for name in self.answers}})
        write_text(folder / "problems.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        shown = []
        for place, problem in enumerate(self.problems[: len(next(iter(self.answers.values())).texts)]):
            texts = {name: found.texts[place] for name, found in self.answers.items()}
            shown.append({"id": problem.id, "prompt": problem.text, "answer": problem.row.get(ANSWER), **texts})
        write_json(folder / "answers.json", shown)

    def _correct(self, name: str, place: int) -> int:
        return sum(score is not None and score >= RIGHT for score in self.answers[name].scores[place])

    def _pass(self, places: Sequence[int]) -> dict[str, dict[str, Any]]:
        correct = {name: [self._correct(name, place) for place in places] for name in self.answers}
        return pass_figures(correct, self.cfg.samples, self.cfg.k, self.bootstrap_samples, self.seed)

    def _groups(self, field: str) -> dict[str, dict[str, Any]]:
        """Figures of the problems of each task or level; empty where no problem says which it is."""
        groups: dict[Any, list[int]] = {}
        for place in self.scored:
            value = getattr(self.problems[place], field)
            if value is not None:
                groups.setdefault(value, []).append(place)
        return {str(value): {"problems": len(groups[value]), **self._pass(groups[value])} for value in sorted(groups)}


def measure_problems(
    models: Mapping[str, Any], tokenizer: Any, rows: Sequence[Mapping[str, Any]], limit: float, ctx: StageContext
) -> Measured:
    """Have every model answer the problems among the rows, and score the answers.

    Args:
        limit: most positions of the models.

    Raises:
        StageError: no row is a problem that the reward can score and that fits.
        StopRequested: a stop was asked for; finished batches are kept.
    """
    cfg: ProblemSettings = ctx.config.problems
    problems, left_out = find_problems(rows, tokenizer, limit, cfg)
    answers = {name: answer_problems(name, model, tokenizer, problems, cfg, ctx) for name, model in models.items()}
    return Measured(problems, answers, left_out, ctx)
