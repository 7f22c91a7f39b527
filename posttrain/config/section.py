"""The base of every section of a recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of the recipe's sections: unknown keys are errors, values do not change once read."""

    # Deferred: a section is built within the frame, and by itself only if somebody validates it alone.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True, defer_build=True
    )
