"""Preference pairs on generated problems: chosen is the right answer, rejected a wrong one of the input model's own.

Pairs of the model's own mistakes are what preference training can move: an answer that the model would never write
has next to no probability to lose. Re-entrant, as `teacher_samples`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from posttrain.data.builders.batches import batch_seed, cut, in_batches
from posttrain.data.builders.teacher_samples import load_writer, write
from posttrain.data.chat import plain_text
from posttrain.data.documents import Document
from posttrain.data.pairs import UNFINISHED
from posttrain.data.sections import GymTasks, PairSamples
from posttrain.data.tasks import TASK, TaskProblem, draw
from posttrain.errors import StageError
from posttrain.pipeline.context import StageContext
from posttrain.rewards import plugin
from posttrain.rewards.pool import Job, Pool

LICENCE = "Apache-2.0 (reasoning-gym), rejected answers that of the model that wrote them"

RIGHT, WRONG, UNCLEAR, UNSCORED, EMPTY = "right", "wrong", "unclear", "unscored", "empty"
"""What a sampled answer can be; unclear: it scores low, but the right answer stands in it."""


def build(
    tasks: GymTasks, pairs: PairSamples, heldout_fraction: float, ctx: StageContext
) -> tuple[list[Document], list[Document]]:
    """Training and held-out pairs; no held-out ones with `heldout_fraction` 0.

    Raises:
        StageError: a split is empty, because the model answered everything rightly or nothing could be scored.
        StopRequested: a stop was asked for; the finished batches are kept.
    """
    problems = draw(tasks, heldout_fraction, ctx.seed)
    everything = [*problems.train, *problems.heldout]
    batches = cut(everything, pairs.batch_size)
    with ExitStack() as stack:
        outcomes = in_batches(ctx, batches, lambda: _sampler(pairs, ctx, batches, stack))
    _record(ctx, outcomes, problems.duplicates)
    documents = [_document(problem, outcome) for problem, outcome in zip(everything, outcomes, strict=True)]
    here = len(problems.train)
    train, heldout = ([found for found in part if found] for part in (documents[:here], documents[here:]))
    if not train or (problems.heldout and not heldout):
        _refuse(outcomes, "training" if not train else "held-out")
    return train, heldout


def verdict(answer: str, score: float | None, right: str, wrong_below: float) -> str:
    """What an answer is. A low score alone does not make it wrong: tasks mark down every word beside the answer."""
    if not answer:
        return EMPTY
    if score is None:
        return UNSCORED
    if score >= wrong_below:
        return RIGHT
    # Not within a longer number or word: 7 does not stand in 17, 7.5 or -7.
    stands = re.search(rf"(?<![\w.,-]){re.escape(right)}(?!\w|[.,]\d)", answer, flags=re.IGNORECASE)
    return UNCLEAR if stands else WRONG


def _sampler(
    pairs: PairSamples, ctx: StageContext, batches: list[list[TaskProblem]], stack: ExitStack
) -> Callable[[int], list[dict[str, Any]]]:
    model, tokenizer = load_writer(ctx, pairs.dtype)
    score_all = _scores(pairs, stack)

    def sample(number: int) -> list[dict[str, Any]]:
        problems = batches[number]
        outcomes: list[dict[str, Any]] = [{"rejected": None, "ended": True, "tries": []} for _ in problems]
        for attempt in range(pairs.tries):
            open_ones = [index for index, outcome in enumerate(outcomes) if outcome["rejected"] is None]
            if not open_ones:
                break
            seed = batch_seed("preference_pairs", ctx.seed, number, attempt)
            questions = [problems[index].question for index in open_ones]
            written = write(model, tokenizer, questions, pairs, seed)
            scores = score_all([problems[index] for index in open_ones], [answer for answer, _ in written])
            for index, (answer, ended), score in zip(open_ones, written, scores, strict=True):
                found = verdict(answer, score, problems[index].answer, pairs.wrong_below)
                outcomes[index]["tries"].append(found)
                if found == WRONG:
                    outcomes[index] |= {"rejected": answer, "ended": ended}
        return outcomes

    return sample


def _scores(pairs: PairSamples, stack: ExitStack) -> Callable[[list[TaskProblem], list[str]], Sequence[float | None]]:
    """What scores answers: the tasks themselves, or the named reward."""
    if pairs.reward is None:
        pool = stack.enter_context(Pool(1, prepare=["posttrain.rewards.gym", "reasoning_gym"], where="data.pairs"))
        return lambda problems, answers: _own_scores(pool, pairs.score_seconds, problems, answers)
    reward = plugin.load(pairs.reward, "data.pairs.reward")
    return lambda problems, answers: reward(
        [problem.question for problem in problems],
        answers,
        [{"id": problem.id, "answer": problem.answer, TASK: problem.task} for problem in problems],
    )


def _own_scores(pool: Pool, seconds: float, problems: list[TaskProblem], answers: list[str]) -> list[float | None]:
    """The tasks' own scores; None for an empty answer, and for one whose scoring took too long or failed."""
    there = [number for number, answer in enumerate(answers) if answer]
    jobs = [
        Job("posttrain.rewards.gym:score", (answers[number], problems[number].task, None), seconds) for number in there
    ]
    scores: list[float | None] = [None] * len(answers)
    for number, outcome in zip(there, pool.run(jobs), strict=True):
        scores[number] = outcome.value[0] if outcome.status == "value" else None
    return scores


def _document(problem: TaskProblem, outcome: dict[str, Any]) -> Document | None:
    if outcome["rejected"] is None:
        return None
    prompt = [{"role": "user", "content": problem.question}]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (problem.answer, outcome["rejected"]))
    fields = {"prompt": prompt, "chosen": chosen, "rejected": rejected, TASK: problem.task}
    if not outcome["ended"]:
        fields[UNFINISHED] = ["rejected"]
    return Document(id=problem.id, text=plain_text([*prompt, *chosen]), group=problem.question, fields=fields)


def _record(ctx: StageContext, outcomes: list[dict[str, Any]], duplicates: int) -> None:
    used = [outcome for outcome in outcomes if outcome["rejected"] is not None]
    left_out = [outcome["tries"] for outcome in outcomes if outcome["rejected"] is None]
    tries = Counter(found for outcome in outcomes for found in outcome["tries"])
    ctx.record_result(
        questions=len(outcomes),
        duplicates=duplicates,
        unfinished=sum(not outcome["ended"] for outcome in used),
        always_right=sum(set(found) == {RIGHT} for found in left_out),
        never_wrong=sum(set(found) != {RIGHT} for found in left_out),
        tries={name: tries[name] for name in (RIGHT, WRONG, UNCLEAR, UNSCORED, EMPTY)},
    )


def _refuse(outcomes: list[dict[str, Any]], split: str) -> None:
    tries = Counter(found for outcome in outcomes for found in outcome["tries"])
    said = ", ".join(f"{count} {name}" for name, count in tries.most_common())
    raise StageError(
        f"no {split} pair: the model's answers to {len(outcomes)} questions are {said}",
        where="data.pairs",
        fix="harder tasks (data.gym.tasks) if they are right, more of them (data.gym.size), or more data.pairs.tries; "
        "look at the model's chat template if they are empty",
    )
