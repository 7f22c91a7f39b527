"""What is wrong with the inputs that a plan gives a training stage: the checks that several stages share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import Problem
from posttrain.pipeline.stage import ArtifactMeta


def given(cfg: Any, *roles: str) -> str:
    """The inputs of those roles as the recipe gives them."""
    return ", ".join(f"{role}={cfg.inputs.get(role, '?')}" for role in roles)


def no_documents(cfg: Any, data: ArtifactMeta) -> list[Problem]:
    """The input `data` is known to be empty."""
    if data.rows != 0:
        return []
    return [Problem("the training data has no documents", where=given(cfg, "data"), fix="give a file with text")]


def too_long(cfg: Any, **shapes: Mapping[str, Any] | None) -> list[Problem]:
    """`sequence_length` exceeds the positions of a model; `shapes` are the architectures by role, where known."""
    problems = []
    for role, shape in shapes.items():
        if shape and cfg.sequence_length > (longest := shape["max_position_embeddings"]):
            what = f"sequence_length {cfg.sequence_length} exceeds the {role}'s {longest} positions"
            problems.append(Problem(what, where="sequence_length", fix=f"sequence_length={longest}"))
    return problems


def unfit_teacher(
    cfg: Any, student: ArtifactMeta, teacher: ArtifactMeta, *, idle: str | None, apart: str, fix: str
) -> list[Problem]:
    """The teacher is the student itself, or has another tokenizer.

    Args:
        idle: why a student learns nothing from itself; None where it may be its own teacher.
        apart: what different tokenizers forbid.
        fix: which teacher to give.
    """
    problems, where = [], given(cfg, "student", "teacher")
    if idle is not None and cfg.inputs and cfg.inputs.get("student") == cfg.inputs.get("teacher"):
        problems.append(Problem(f"the teacher is the student itself: {idle}, nothing is learnt", where=where, fix=fix))
    if student.tokenizer and teacher.tokenizer and student.tokenizer != teacher.tokenizer:
        digests = f"digests {student.tokenizer[:12]} and {teacher.tokenizer[:12]}"
        what = f"student and teacher have different tokenizers ({digests}): {apart}"
        problems.append(Problem(what, where=where, fix=fix))
    return problems
