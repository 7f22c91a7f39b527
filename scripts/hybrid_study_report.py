"""Table, curves and figures of `hybrid_study.py`, from its result files alone."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = ("perplexity", "kl", "top1_agreement")
Run = dict[str, Any]


def report(results: Path, to: Path) -> None:
    """`runs.csv` (a row a run), `table.md` (a row an arm and share), `curves.png` and `final.png`.

    Raises:
        SystemExit: there is no finished run.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    if not runs:
        raise SystemExit(f"no finished run in {results}")
    to.mkdir(parents=True, exist_ok=True)
    rows = [_row(run) for run in runs]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (to / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    hidden = ("arm", "attention", "seed", "kept")
    shown = [column for column in columns if column not in hidden and not column.endswith(("_low", "_high"))]
    lines = [f"| arm | attention | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 3) + "|"]
    for arm, share in dict.fromkeys((row["arm"], row["attention"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["attention"]) == (arm, share)]
        cells = [_cell([row[column] for row in own if column in row]) for column in shown]
        lines.append(f"| {arm} | {share:.0%} | {len(own)} | {' | '.join(cells)} |")
    (to / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(runs, to / "curves.png")
    draw_final(rows, to / "final.png")
    print("\n".join(lines))


def _row(run: Run) -> Run:
    found = run["result"]
    needles = {key: value for key, value in found.items() if key.startswith("needle") and _number(value)}
    return {
        **{name: run[name] for name in ("arm", "attention", "seed")},
        **{figure: found[figure] for figure in FIGURES},
        **needles,
        "kept": " ".join(map(str, run["kept"])),
    }


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    each = f" ({', '.join(f'{value:.4g}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.4g}{each}"


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Loss of the distillation against its tokens, both alignments' counted before; a panel a share, a line a run."""
    plt = _pyplot()
    shares, arms = sorted({run["attention"] for run in runs}), sorted({run["arm"] for run in runs})
    figure, axes = plt.subplots(1, len(shares), figsize=(5.5 * len(shares), 4), squeeze=False, sharey=True)
    for axis, share in zip(axes[0], shares, strict=True):
        for run in (run for run in runs if run["attention"] == share):
            points = [((run["tokens_before"] + tokens) / 1e6, loss) for tokens, loss in _smooth(run["curve"])]
            axis.plot(*zip(*points, strict=True), color=f"C{arms.index(run['arm'])}", linewidth=1)
        axis.set(xlabel="training tokens, millions", title=f"{share:.0%} of the layers attention")
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("training KL to the source, nats/token")
    handles = [plt.Line2D([], [], color=f"C{index}") for index in range(len(arms))]
    figure.legend(handles, arms, ncols=len(arms), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(curve: Sequence[tuple[int, float]], width: int = 10) -> list[tuple[int, float]]:
    """Means over `width` logged steps."""
    parts = [curve[at : at + width] for at in range(0, len(curve), width)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def draw_final(rows: Sequence[Run], path: Path) -> None:
    """Held-out KL of every run: a column an arm, a panel a share, a dot a seed."""
    plt = _pyplot()
    shares, arms = sorted({row["attention"] for row in rows}), sorted({row["arm"] for row in rows})
    figure, axes = plt.subplots(1, len(shares), figsize=(4.5 * len(shares), 3.6), squeeze=False, sharey=True)
    for axis, share in zip(axes[0], shares, strict=True):
        own = [row for row in rows if row["attention"] == share]
        axis.scatter([arms.index(row["arm"]) for row in own], [row["kl"] for row in own], s=18)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=8)
        axis.set_title(f"{share:.0%} of the layers attention", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out KL to the source, nats/token", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
