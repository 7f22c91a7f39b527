"""`posttrain diff RUN RUN`: what differs between two runs, and which change came first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.diff import RunDiff


def command(
    first: Annotated[str, typer.Argument(help="A run's name or its beginning, or its folder.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    outputs: Annotated[Path, typer.Option(metavar="DIR", help="The outputs folder.")] = Path("outputs"),
    json_: Annotated[bool, typer.Option("--json", help="The comparison as JSON.")] = False,
) -> None:
    """Compare two runs, finished or not: settings, data, code and machine by stage, the first change, and results."""
    from posttrain.pipeline.diff import compare_runs
    from posttrain.pipeline.run_dir import find_run

    found = compare_runs(find_run(first, outputs), find_run(second, outputs))
    if json_:
        import json

        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        typer.echo("\n".join(lines_of(found)))


def lines_of(diff: RunDiff) -> list[str]:
    """The comparison for a reader."""
    from posttrain.pipeline.plan_text import duration, table

    lines = [f"first:  {diff.first}", f"second: {diff.second}", ""]
    for stage in diff.stages:
        parents = f" ({', '.join(stage.parents)})" if stage.parents else ""
        files = ", but its files differ" if stage.files else ""
        lines.append(f"{stage.name}: {stage.status}{parents if stage.status != 'same' else ''}{files}")
        lines += [f"  {line}" for line in stage.changes]
    cause = diff.cause
    if cause is not None:
        lines += ["", f"first change: {cause.name}: {', '.join(cause.changes) or cause.status}"]
    elif any(stage.files for stage in diff.stages):
        first = next(stage for stage in diff.stages if stage.files)
        lines += ["", f"all keys are equal; the first files that differ are those of {first.name}"]
    else:
        lines += ["", "all keys are equal: the runs compute the same"]
    machine = list(dict.fromkeys(line for stage in diff.stages for line in stage.machine))
    if machine:
        lines += ["", "code and machine:", *(f"  {line}" for line in machine)]
    rows = [
        (stage.name, name, f"{old:.6g}", f"{new:.6g}", f"{new - old:+.4g}")
        for stage in diff.stages
        for name, (old, new) in stage.metrics.items()
        if old != new
    ]
    if rows:
        lines += ["", *table(("stage", "result", "first", "second", "difference"), rows, right=(2, 3, 4))]
    times = [
        (s.name, duration(s.seconds[0]), duration(s.seconds[1])) for s in diff.stages if s.seconds[0] != s.seconds[1]
    ]
    if times:
        lines += ["", *table(("stage", "time of first", "time of second"), times, right=(1, 2))]
    return lines
