"""Numbers as the report prints them."""

from __future__ import annotations

from typing import Any

NONE = "–"


def significant(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, thousands separated: 16.32, 1,234, 0.04317."""
    if value is None:
        return NONE
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.{digits - 1}e}"


def with_interval(values: dict[str, Any], name: str) -> str:
    """`16.32 (14.90 to 17.81)`, or the value alone where there is no interval."""
    if name not in values:
        return NONE
    text, low = significant(values[name]), values.get(f"{name}_low")
    return text if low is None else f"{text} ({significant(low)} to {significant(values[f'{name}_high'])})"


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def whole(value: float | None) -> str:
    """Exact, thousands separated."""
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) or not float(value).is_integer() else f"{int(value):,}"


def byte_size(value: float | None) -> str:
    """`1.31 GiB`."""
    if value is None:
        return NONE
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(max(int(value).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{value:.0f} B" if power == 0 else f"{value / 1024**power:.2f} {units[power]}"


def duration(seconds: float | None) -> str:
    """`48.1 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
