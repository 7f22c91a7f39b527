"""Table and learning curves of `mla_study.py`: every run against the model it started from."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = {"text": "held-out text", "samples": "held-out chats of the source (teacher_samples)"}
Run = dict[str, Any]


def write_report(works: Sequence[Path], out: Path) -> None:
    """`table.md`, `curves_<stage>.png` and `runs.jsonl` (every curve) of all stages of all work folders."""
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with (out / "runs.jsonl").open("w", encoding="utf-8") as file:
        for work in works:
            for folder in sorted(path for path in work.iterdir() if any(path.glob("*-*-*.json"))):
                runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))]
                name = folder.name if len(works) == 1 else f"{work.name}_{folder.name}"
                for run in runs:
                    file.write(json.dumps({"stage": name, **run}) + "\n")
                lines += [f"## {name}", "", *table(runs), ""]
                draw(runs, out / f"curves_{name}.png")
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def table(runs: Sequence[Run]) -> list[str]:
    """Markdown: a row an arm and budget; means over seeds, with the spread (largest less smallest) where several."""
    groups: dict[tuple[int, str], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["budget"], run["arm"]].append(run)
    head = ("r + d_r", "arm", "seeds", "tokens", "KL text", "KL chats", "perplexity text", "top-1 text")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    last = {key: statistics.mean(run["curve"][-1]["text"]["kl"] for run in group) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: (-key[0], last[key])):
        group = groups[key]
        cells = [str(key[0]), key[1], str(len(group)), f"{group[0]['curve'][-1]['tokens'] / 1e6:.1f}M"]
        for kind in KINDS:
            start, end = _of(group, 0, kind, "kl"), _of(group, -1, kind, "kl")
            cells.append(f"{_said(start)} → **{_said(end)}**")
        cells += [_said([2.718281828**nll for nll in _of(group, -1, "text", "nll")], 1)]
        cells += [_said([100 * share for share in _of(group, -1, "text", "top1")], 1) + " %"]
        rows.append("| " + " | ".join(cells) + " |")
    source = statistics.mean(run["curve"][0]["text"]["source_nll"] for run in runs)
    chats = statistics.mean(run["curve"][0]["samples"]["source_nll"] for run in runs)
    return [*rows, "", f"Source: perplexity {2.718281828**source:.2f} on text, {2.718281828**chats:.2f} on chats."]


def _of(group: Sequence[Run], place: int, kind: str, name: str) -> list[float]:
    return [run["curve"][place][kind][name] for run in group]


def _said(values: Sequence[float], digits: int = 3) -> str:
    spread = f" (±{(max(values) - min(values)) / 2:.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """KL to the source against training tokens: a row of panels a kind of text, a column a budget, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets, arms = sorted({run["budget"] for run in runs}, reverse=True), sorted({run["arm"] for run in runs})
    colours = {arm: f"C{index}" for index, arm in enumerate(arms)}
    size = (4.2 * len(budgets) + 1, 7)
    figure, axes = plt.subplots(len(KINDS), len(budgets), figsize=size, squeeze=False, sharex="col")
    for row, (kind, label) in enumerate(KINDS.items()):
        for column, budget in enumerate(budgets):
            axis = axes[row][column]
            for run in (run for run in runs if run["budget"] == budget):
                points = [(point["tokens"] / 1e6, point[kind]["kl"]) for point in run["curve"]]
                axis.plot(*zip(*points, strict=True), color=colours[run["arm"]], linewidth=1, marker=".", markersize=3)
            axis.set_yscale("log")
            axis.set_title(f"{label}, r + d_r = {budget}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        axes[row][0].set_ylabel("KL to the source, nats/token", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("training tokens, millions", fontsize=8)
    handles = [plt.Line2D([], [], color=colours[arm]) for arm in arms]
    figure.legend(handles, arms, ncols=len(arms), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
