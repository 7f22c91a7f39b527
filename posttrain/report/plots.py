"""The report's plots: PNG bytes from plain numbers. matplotlib is imported late and draws without a display."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from posttrain.report.facts import Row
from posttrain.report.palette import COLOURS, GREY
from posttrain.report.read import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "lines.linewidth": 1.8,
}
SMOOTHING_FROM = 60
"""Training logs with more rows than this are drawn with a running mean over a twentieth of them."""


Panels = list[tuple[str, bytes]]
"""File name (without suffix) and PNG of each panel of a figure: separate images, so that they stack on a phone."""


def _draw(panels: Sequence[tuple[str, Callable[[Axes], None]]]) -> Panels:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    with pyplot.rc_context(STYLE):
        for name, panel in panels:
            figure, axis = pyplot.subplots(figsize=(5.2, 3.7))
            panel(axis)
            drawn.append((name, _png(figure)))
    return drawn


def _png(figure: Figure) -> bytes:
    from matplotlib import pyplot

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()


def colours(rows: Sequence[Row]) -> list[str]:
    """One colour a row: sources are grey, the others keep theirs over all plots."""
    free = iter(COLOURS * (1 + len(rows) // len(COLOURS)))
    return [GREY if row.is_source else next(free) for row in rows]


def quality_and_cache(rows: Sequence[Row]) -> Panels:
    """Held-out perplexity with its 95 % interval beside the KV cache per token, a bar a model."""
    names = [short_label(row.label) for row in rows]
    paint = colours(rows)

    def quality(axis: Axes) -> None:
        values = [row.values["perplexity"] for row in rows]
        bars = axis.bar(names, values, color=paint, width=0.62)
        spread = max(values) > 12 * min(values)
        if spread:
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis)
        tops = []
        for index, row in enumerate(rows):
            low, high = row.values.get("perplexity_low"), row.values.get("perplexity_high")
            tops.append(values[index] if high is None else high)
            if low is not None and high is not None:
                error = [[max(0.0, values[index] - low)], [max(0.0, high - values[index])]]
                axis.errorbar(index, values[index], yerr=error, color="#333333", capsize=4, linewidth=1.2)
        for bar, value, top in zip(bars, values, tops, strict=True):
            axis.annotate(
                f"{value:.4g}",
                (bar.get_x() + bar.get_width() / 2, top),
                ha="center",
                va="bottom",
                xytext=(0, 3),
                textcoords="offset points",
            )
        axis.set_title("Held-out perplexity (lower is better)")
        axis.set_ylabel("perplexity" + (", log scale" if spread else ""))
        _headroom(axis, max(tops), log=spread)
        _bars_only(axis)

    def cache(axis: Axes) -> None:
        values = [row.values.get("kv_bytes_per_token_measured") or 0 for row in rows]
        unit, size = ("KiB", 1024) if max(values) >= 4096 else ("B", 1)
        bars = axis.bar(names, [value / size for value in values], color=paint, width=0.62)
        first = values[0]
        labels = [
            f"{value / size:.4g}" + (f"\n({100 * value / first:.1f} %)" if index and first and value != first else "")
            for index, value in enumerate(values)
        ]
        axis.bar_label(bars, labels=labels, padding=3)
        axis.set_title("KV cache per token (share of the first)" if len(set(values)) > 1 else "KV cache per token")
        axis.set_ylabel(f"{unit} per token ({rows[0].values.get('precision', '')})")
        _headroom(axis, max(values) / size, log=False)
        _bars_only(axis)

    return _draw([("perplexity", quality), ("kv_cache", cache)])


def _headroom(axis: Axes, top: float, *, log: bool) -> None:
    low, high = axis.get_ylim()
    axis.set_ylim(low if log else 0, max(high, top * (1.6 if log else 1.18)))


def _bars_only(axis: Axes) -> None:
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", length=0)


def short_label(label: str) -> str:
    """A label for an axis: broken at spaces and underscores so that it stays narrow."""
    lines, line = [], ""
    for word in label.replace("_", "_ ").split(" "):
        if line and len(line) + len(word) > 14:
            lines.append(line)
            line = word
        else:
            line = line + ("" if not line or line.endswith("_") else " ") + word
    return "\n".join([*lines, line])


def training_curves(histories: Sequence[tuple[str, list[Json]]]) -> Panels:
    """Loss, and kl, ce and reward where the log has them, over the optimiser steps of each training stage."""
    named = [
        name for name in ("loss", "kl", "ce", "reward") if any(name in row for _, rows in histories for row in rows)
    ]
    # The loss of a plain distillation is its KL: a second panel with the same curve tells nothing.
    same = [name for name in named if name != "loss" and _same_curve(histories, "loss", name)]
    shown = [name for name in named if name not in same][:3] or ["loss"]
    titles = {"loss": "Training loss" + "".join(f" ({name.upper()})" for name in same), "reward": "Reward"}

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for index, (label, rows) in enumerate(histories):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    _curve(axis, points, label, COLOURS[index % len(COLOURS)])
            axis.set_title(titles.get(name, f"Training {name.upper()}"))
            axis.set_xlabel("optimiser step")
            axis.set_ylabel("KL, nats per token" if name == "kl" or "kl" in same else name)
            axis.legend()

        return draw

    return _draw([(f"training_{name}", panel(name)) for name in shown])


def _same_curve(histories: Sequence[tuple[str, list[Json]]], one: str, other: str) -> bool:
    return all(row.get(one) == row.get(other) for _, rows in histories for row in rows)


def _curve(axis: Axes, points: list[tuple[float, float]], label: str, colour: str) -> None:
    steps, values = [point[0] for point in points], [point[1] for point in points]
    if len(points) <= SMOOTHING_FROM:
        axis.plot(steps, values, color=colour, label=label, marker="o" if len(points) < 25 else None, markersize=4)
        return
    span = len(points) // 20
    means = [sum(values[max(0, i - span) : i + 1]) / (i + 1 - max(0, i - span)) for i in range(len(values))]
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axis.plot(steps, means, color=colour, label=f"{label} (mean of {span + 1} steps)")


def conversion_layers(stage: str, layers: Sequence[Json]) -> Panels:
    """Errors, kept energies and (where they differ) ranks of each converted layer, from the keys the records have."""
    numeric = [key for key, value in layers[0].items() if key != "layer" and isinstance(value, (int, float))]
    ranks = [key for key in numeric if key.endswith("rank") and len({row.get(key) for row in layers}) > 1]
    groups = (
        (
            "error",
            [key for key in numeric if key.endswith("error")],
            "Relative error of the conversion",
            "‖error‖ / ‖original‖",
        ),
        ("energy", [key for key in numeric if key.endswith("energy")], "Energy kept", "share"),
        ("rank", ranks, "Rank", "rank"),
    )

    def panel(keys: list[str], title: str, unit: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for index, key in enumerate(keys):
                values = [row.get(key) for row in layers]
                marker = MARKERS[index % len(MARKERS)]
                label = key.replace("_", " ").replace("rel ", "relative ")
                axis.plot(
                    [row["layer"] for row in layers],
                    values,
                    color=COLOURS[index],
                    marker=marker,
                    markersize=4.5,
                    label=label,
                )
            axis.set(xlabel=f"layer ({stage})", ylabel=unit)
            axis.set_title(title)
            if unit != "share":
                axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if len(keys) > 1:
                axis.legend()

        return draw

    return _draw([(f"conversion_{stage}_{name}", panel(*group)) for name, *group in groups if group[0]])


def documents(rows: Sequence[Row]) -> Panels:
    """Perplexity of every held-out document against the source's; on the diagonal nothing was lost."""
    paint = dict(zip([row.label for row in rows], colours(rows), strict=True))
    compared = [row for row in rows if any("baseline_perplexity" in document for document in row.documents)]

    def draw(axis: Axes) -> None:
        for index, row in enumerate(compared):
            pairs = [(d["baseline_perplexity"], d["perplexity"]) for d in row.documents if "baseline_perplexity" in d]
            axis.scatter(
                [pair[0] for pair in pairs],
                [pair[1] for pair in pairs],
                s=26,
                alpha=0.75,
                marker=MARKERS[index % len(MARKERS)],
                color=paint[row.label],
                label=row.label,
                linewidths=0,
            )
        every = [d for row in compared for d in row.documents if "baseline_perplexity" in d]
        sources = [document["baseline_perplexity"] for document in every]
        values = [*sources, *(document["perplexity"] for document in every)]
        ends = (min(sources) * 0.93, max(sources) * 1.07)
        axis.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.2, label="equal to the source")
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=(min(values) * 0.9, max(values) * 1.1))
        axis.set(xlabel="perplexity of the source, log scale", ylabel="perplexity, log scale")
        _plain_ticks(axis.xaxis, axis.yaxis)
        axis.set_title("Each point is one held-out document")
        axis.legend(loc="upper left", fontsize=9.5)

    return _draw([("documents", draw)])


def _plain_ticks(*sides: Any) -> None:
    """1, 2, 5, 10, … instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for side in sides:
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        side.set_minor_formatter(NullFormatter())
