"""Generated problems as conversations: the question as the user's turn, the right answer as the assistant's."""

from __future__ import annotations

from posttrain.data.chat import plain_text
from posttrain.data.documents import Document
from posttrain.data.problems import ANSWER, with_instruction
from posttrain.data.sections import GymTasks
from posttrain.data.tasks import TASK, TaskProblem, draw
from posttrain.pipeline.context import StageContext

LICENCE = "Apache-2.0 (reasoning-gym, whose word lists and texts have their own, see its repository)"

INSTRUCTION = "Write your final answer between <answer> and </answer>."
"""Behind each question with answer_format=tag."""


def build(tasks: GymTasks, heldout_fraction: float, ctx: StageContext) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; no held-out ones with `heldout_fraction` 0."""
    problems = draw(tasks, heldout_fraction, ctx.seed)
    ctx.record_result(duplicates=problems.duplicates)
    train, heldout = ([_document(found, tasks) for found in part] for part in (problems.train, problems.heldout))
    return train, heldout


def row_fields(tasks: GymTasks) -> tuple[str, ...]:
    """Fields of every row beside text and turns."""
    return (TASK, ANSWER) if tasks.answer_format == "tag" else (TASK,)


def format_bytes(tasks: GymTasks) -> int:
    """Bytes that instruction and tags add to a row's text, for estimates."""
    instruction = _instruction(tasks)
    return (len(instruction.encode()) + 2 if instruction else 0) + (
        len(tagged("")) if tasks.answer_format == "tag" else 0
    )


def tagged(answer: str) -> str:
    """An answer as `answer_format: tag` writes it."""
    return f"<answer>{answer}</answer>"


def _instruction(tasks: GymTasks) -> str | None:
    return INSTRUCTION if tasks.instruction is None and tasks.answer_format == "tag" else tasks.instruction


def _document(problem: TaskProblem, tasks: GymTasks) -> Document:
    fields, answer = {TASK: problem.task}, problem.answer
    # A plain row has the right answer as its last turn, and stays as it was when its key was first given.
    if tasks.answer_format == "tag":
        fields[ANSWER], answer = problem.answer, tagged(problem.answer)
    turns = (("user", with_instruction(problem.question, _instruction(tasks))), ("assistant", answer))
    text = plain_text([{"role": role, "content": content} for role, content in turns])
    return Document(id=problem.id, text=text, messages=turns, fields=fields)
