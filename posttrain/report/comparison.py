"""Several runs beside each other: what differs in their settings, what came of it, and what it cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.pipeline.run_dir import RunDir
from posttrain.report import plots
from posttrain.report.blocks import Block, Code, Figure, Heading, Notice, Table, Text
from posttrain.report.numbers import NONE, duration, significant
from posttrain.report.palette import COLOURS
from posttrain.report.read import Json, RunRecord, StageRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOWER = ("perplexity", "nll", "loss", "kl", "bytes", "seconds")
HIGHER = ("accuracy", "margin", "pass@", "score", "needle_")
"""Words of a metric's name that say which direction is the better one; without one, no best value is marked."""
MOST_CURVES = 12
MOST_DIFFERENCES = 24


@dataclass(frozen=True)
class Entry:
    """One run of a comparison: its values of what differs, and what was measured."""

    run: RunRecord
    values: dict[str, str]
    status: str

    @property
    def label(self) -> str:
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.values.items()) or self.run.name


def entries_of(folders: Sequence[Path], record: Json | None = None) -> list[Entry]:
    """The runs in those folders; what differs is what was swept, or else every setting in which they differ."""
    runs = [read_run(folder) for folder in folders]
    swept = {point["run"]: point for point in (record or {}).get("points", [])}
    if record is not None:
        # What became of runs that were submitted to a cluster is in their own events alone.
        told = {name: point["status"] for name, point in swept.items() if point["status"] != "submitted"}
        return [Entry(run, dict(swept[run.name]["values"]), told.get(run.name, run.status)) for run in runs]
    differing = differing_settings(runs)
    return [
        Entry(run, {key: values[index] for key, values in differing.items()}, run.status)
        for index, run in enumerate(runs)
    ]


def differing_settings(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Dotted key to the value in each run, for settings of stages and the seed in which the runs are not all alike."""
    flat = [dict(_flat(run)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    found = {key: [_shown(settings.get(key)) for settings in flat] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(run: RunRecord) -> Iterator[tuple[str, Any]]:
    entries = RunDir(run.folder).record()["stages"]
    yield "seed", run.seed
    for stage in run.stages:
        # The settings that make up the key, whether the stage is done or not.
        document = next(entry for entry in entries if entry["name"] == stage.name)
        for key, value in ((document.get("key_document") or {}).get("config") or {}).items():
            yield f"{stage.name}.{key}", value


def _shown(value: Any) -> str:
    return NONE if value is None else str(value)


def metrics(entries: Sequence[Entry]) -> dict[str, list[float | None]]:
    """Metric to its value in every run: last evaluation's figures, and the last tenth of training logs."""
    table: dict[str, list[float | None]] = {}
    for index, entry in enumerate(entries):
        for name, value in _figures(entry.run):
            table.setdefault(name, [None] * len(entries))[index] = value
    return {name: values for name, values in table.items() if any(value is not None for value in values)}


def _figures(run: RunRecord) -> Iterator[tuple[str, float]]:
    for stage in run.stages:
        result = stage.result
        if "perplexity" in result:
            tries = ((result.get("problems") or {}).get("settings") or {}).get("k") or []
            lengths = ((result.get("needle") or {}).get("settings") or {}).get("lengths") or []
            hidden = [f"needle_{name}@{length}" for length in lengths for name in ("choice", "logprob")]
            for name in ("perplexity", "kv_bytes_per_token_measured", *(f"pass@{k}" for k in tries), *hidden):
                if isinstance(result.get(name), int | float):
                    yield f"{stage.name}: {name}", result[name]
            continue
        names = [name for name in ("final_loss", "loss") if name in result]
        names += [name for name in result if name.startswith("last_tenth") and name != "last_tenth_loss"]
        names = ["last_tenth_loss" if "last_tenth_loss" in result else name for name in names[:1]] + names[1:]
        if stage.history and names:
            for name in names:
                if isinstance(result.get(name), int | float):
                    yield f"{stage.name}: {name}", result[name]
        elif any(True for _ in stage.outputs("evaluation")):
            for name, value in result.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield f"{stage.name}: {name}", value


def best(name: str, values: Sequence[float | None]) -> float | None:
    """The best of a metric's values, None where its name does not say what is better or all are alike."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(set(known)) < 2:
        return None
    metric = name.rpartition(": ")[2]
    if any(word in metric for word in HIGHER):
        return max(known)
    return min(known) if any(word in metric for word in LOWER) else None


def blocks(title: str, entries: Sequence[Entry], record: Json | None) -> list[Block]:
    """The comparing report."""
    parts = (_summary(entries, record), _table(entries), _figures_of(entries), _cost(entries, record))
    return [Heading(title, 1), *(block for part in parts for block in part)]


def _summary(entries: Sequence[Entry], record: Json | None) -> Iterator[Block]:
    points = len(record["points"]) if record else len(entries)
    done = sum(entry.status == "done" for entry in entries)
    yield Text(f"{done} of {points} runs are done." if record else f"{len(entries)} runs beside each other.")
    for entry in entries:
        for stage in entry.run.stages:
            if stage.status == "failed":
                yield Notice(f"{entry.label}: stage {stage.name} failed: {stage.message}")
    if record and (missing := [p for p in record["points"] if p["run"] is None and p["status"] != "pending"]):
        yield Notice(f"{len(missing)} points could not be planned when their turn came.")


def _table(entries: Sequence[Entry]) -> Iterator[Block]:
    keys = list(dict.fromkeys(key for entry in entries for key in entry.values))[:MOST_DIFFERENCES]
    measured = metrics(entries)
    yield Heading("Results")
    header = ["run", *keys, "status", *measured]
    winners = {name: best(name, values) for name, values in measured.items()}
    rows = []
    for index, entry in enumerate(entries):
        cells = [entry.run.name, *(entry.values.get(key, NONE) for key in keys), entry.status]
        for name, values in measured.items():
            value = values[index]
            mark = " (best)" if value is not None and value == winners[name] else ""
            cells.append(significant(value) + mark)
        rows.append(cells)
    yield Table(header, rows)
    if not measured:
        yield Text("No stage of these runs has measured anything yet.")
    yield Text(
        "“best” compares single figures; whether a difference is more than noise, intervals and seeds must tell."
    )


def _figures_of(entries: Sequence[Entry]) -> Iterator[Block]:
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    stages = dict.fromkeys(stage.name for entry in entries for stage in entry.run.stages if _curve(stage))
    panels += [(f"curves_{name}", _curves(name, entries)) for name in stages]
    numeric = [key for key in entries[0].values if all(_number(entry.values.get(key)) is not None for entry in entries)]
    if len(numeric) == 1 and len(entries) > 1:
        for position, (name, values) in enumerate(metrics(entries).items()):
            if best(name, values) is not None:
                panels.append((f"metric_{position}", _against(numeric[0], name, values, entries)))
    if panels:
        yield Figure(plots._draw(panels), "Training logs of the runs over steps; figures against what was swept.")


def _curve(stage: StageRecord) -> list[tuple[float, float]]:
    """Step and divergence of a training log, or its loss where it has none."""
    name = "kl" if all("kl" in row for row in stage.history) else "loss"
    return [(row["step"], row[name]) for row in stage.history if "step" in row and name in row]


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _curves(stage: str, entries: Sequence[Entry]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        found = [(entry, _curve(own)) for entry in entries if (own := entry.run.stage(stage)) is not None]
        for index, (entry, pairs) in enumerate([pair for pair in found if pair[1]][:MOST_CURVES]):
            steps, values = zip(*pairs, strict=True)
            axis.plot(steps, values, color=COLOURS[index % len(COLOURS)], label=entry.label)
        axis.set_title(f"{stage}: training log")
        axis.set_xlabel("step")
        axis.legend(fontsize=8)

    return draw


def _against(key: str, name: str, values: Sequence[float | None], entries: Sequence[Entry]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        pairs = sorted((_number(e.values[key]), v) for e, v in zip(entries, values, strict=True) if v is not None)
        places = [place for place, _ in pairs]
        axis.plot(places, [value for _, value in pairs], marker="o", color=COLOURS[0])
        if min(places) > 0 and max(places) >= 10 * min(places):
            axis.set_xscale("log")
        axis.set_title(name)
        axis.set_xlabel(key)

    return draw


def _cost(entries: Sequence[Entry], record: Json | None) -> Iterator[Block]:
    yield Heading("Cost")
    seen: set[tuple[str, str]] = set()
    rows = []
    for entry in entries:
        new = [stage for stage in entry.run.stages if stage.manifest and (stage.type, stage.key) not in seen]
        shared = [s.name for s in entry.run.stages if s.manifest and (s.type, s.key) in seen]
        seen |= {(stage.type, stage.key) for stage in new}
        seconds = sum(stage.manifest["seconds"] for stage in new)
        rows.append([entry.run.name, duration(seconds), ", ".join(shared) or NONE])
    yield Table(["run", "computing time of its own", "stages shared with a run above"], rows)
    if record:
        yield Code(f"posttrain run {record['recipe']} -m {' '.join(record['overrides'])}")


def digest_of(entries: Sequence[Entry], record: Json | None) -> str:
    """What the report is made of."""
    facts_ = [[entry.run.digest(), entry.status, sorted(entry.values.items())] for entry in entries]
    points = [point["status"] for point in record["points"]] if record else []
    return hashlib.sha256(repr([facts_, points, Path(__file__).read_bytes()]).encode()).hexdigest()
