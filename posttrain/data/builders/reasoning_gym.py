"""Generated problems as conversations: the question as the user's turn, the right answer as the assistant's."""

from __future__ import annotations

from posttrain.data.chat import plain_text
from posttrain.data.config import GymTasks
from posttrain.data.documents import Document
from posttrain.data.tasks import TASK, TaskProblem, draw
from posttrain.pipeline.context import StageContext

LICENCE = "Apache-2.0 (reasoning-gym, whose word lists and texts have their own, see its repository)"


def build(tasks: GymTasks, heldout_fraction: float, ctx: StageContext) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; no held-out ones with `heldout_fraction` 0."""
    problems = draw(tasks, heldout_fraction, ctx.seed)
    ctx.record_result(duplicates=problems.duplicates)
    return [_document(problem) for problem in problems.train], [_document(problem) for problem in problems.heldout]


def _document(problem: TaskProblem) -> Document:
    turns = (("user", problem.question), ("assistant", problem.answer))
    text = plain_text([{"role": role, "content": content} for role, content in turns])
    return Document(id=problem.id, text=text, messages=turns, fields={TASK: problem.task})
