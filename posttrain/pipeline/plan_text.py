"""A plan as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.pipeline.plan import Plan, StagePlan
    from posttrain.pipeline.stage import Estimate

CACHE = "cache/token (bf16)"
_UNITS = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def big_number(value: float | None) -> str:
    """134515008 → `134.5M`; `-` for None."""
    if value is None:
        return "-"
    for unit, letter in _UNITS:
        if abs(value) >= unit:
            return f"{value / unit:.1f}{letter}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Bytes for a reader, in powers of ten; `-` for None."""
    return "-" if value is None else f"{big_number(value)} B" if abs(value) < 1000 else _spaced(big_number(value))


def _spaced(text: str) -> str:
    return f"{text[:-1]} {text[-1]}B"


def duration(seconds: float | None) -> str:
    """`45s`, `3m20s`, `2h05m`; `-` for None."""
    if seconds is None:
        return "-"
    whole = int(round(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned lines; columns in `right` are set to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    shown = []
    for line in lines:
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(cells).rstrip())
    return shown


def render(plan: Plan, unknown: Sequence[str] = ()) -> str:
    """The plan for a terminal: a table, memory by terms, notes, and what could not be checked."""
    header = ("stage", "type", "status", "parameters", "trainable", "tokens", "memory", CACHE, "disk", "why")
    lines = [f"{plan.resolved.recipe}: run {plan.run_name} in {plan.outputs}", ""]
    lines += table(header, [_row(planned) for planned in plan.stages], right=(3, 4, 5, 6, 7, 8))
    memory = [planned for planned in plan.stages if planned.estimate.memory]
    if memory:
        lines += ["", "peak memory by term"]
        names = max(len(planned.name) for planned in memory)
        lines += [f"  {planned.name:<{names}}  {_terms(planned)}" for planned in memory]
    notes = [f"  {planned.name}: {note}" for planned in plan.stages for note in planned.estimate.notes]
    lines += ["", "notes", *notes] if notes else []
    lines += ["", "not known", *(f"  {line}" for line in unknown)] if unknown else []
    return "\n".join([*lines, "", _summary(plan)])


def _row(planned: StagePlan) -> tuple[str, ...]:
    estimate = planned.estimate
    status = planned.status if planned.selected else f"{planned.status} (left out)"
    return (
        planned.name,
        planned.stage.type,
        status,
        big_number(estimate.parameters),
        big_number(estimate.trainable),
        big_number(estimate.tokens),
        size(sum(estimate.memory.values()) if estimate.memory else None),
        _cache(estimate),
        size(estimate.disk_bytes),
        "; ".join(planned.reasons),
    )


def _cache(estimate: Estimate) -> str:
    """The growth per token, and beside it what a sequence holds whatever its length."""
    if estimate.cache_bytes_per_token is None:
        return "-"
    states = f" + {size(estimate.cache_state_bytes)}/seq" if estimate.cache_state_bytes else ""
    return f"{estimate.cache_bytes_per_token:,} B{states}"


def _terms(planned: StagePlan) -> str:
    return " + ".join(f"{term} {size(value)}" for term, value in planned.estimate.memory.items())


def _summary(plan: Plan) -> str:
    if not plan.to_do:
        return "Nothing to do: everything is in the store."
    disk = sum(planned.estimate.disk_bytes or 0 for planned in plan.to_do)
    words = f"{len(plan.to_do)} of {len(plan.stages)} stages to run: {', '.join(one.name for one in plan.to_do)}"
    return f"{words}; {size(disk)} on disk." if disk else f"{words}."
