"""What `run -m` and `plan -m` do: expand, check every point, then run them or show what would run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from posttrain.config.sweep import Point
    from posttrain.pipeline.plan import Plan


def sweep(
    recipe: str,
    overrides: list[str],
    config_dir: Path | None,
    selection: Mapping[str, Any],
    name: str | None,
    *,
    dry_run: bool = False,
    yes: bool = False,
    detach: bool = False,
) -> int:
    """Run a sweep, or show it; returns the exit code.

    Args:
        detach: with launcher=slurm, only submit.
        selection: `from_`, `until`, `only` and `force` of `make_plan`, the same for every point.
        name: of the sweep; its runs are then called NAME-1, NAME-2, …
    """
    from posttrain.config.sweep import expand, load_points
    from posttrain.errors import EXIT_DONE
    from posttrain.pipeline.plan import make_plan
    from posttrain.pipeline.sweep import SweepPoint, check_sweep, run_sweep, sweep_name

    points = expand(overrides, config_dir)
    resolved = load_points(recipe, points, config_dir)
    makes, plans = [], []
    forced: set[tuple[str, str]] = set()
    for number, one in enumerate(resolved, 1):
        make = partial(make_plan, one, **selection, name=f"{name}-{number}" if name else None)
        plan = make()
        again = [stage for stage in plan.stages if stage.forced]
        if any((stage.stage.type, stage.key) in forced for stage in again):
            # A stage that points share is forced once; the later points take what came of it.
            left = [stage.name for stage in again if (stage.stage.type, stage.key) not in forced]
            make = partial(make, force=left)
            plan = make()
        forced |= {(stage.stage.type, stage.key) for stage in again}
        makes.append(make)
        plans.append(plan)
    if dry_run:
        typer.echo("\n".join(table_of(points, plans)))
        return EXIT_DONE
    check_sweep(plans, yes=yes)
    called = sweep_name(resolved[0].recipe, plans, name)
    if plans[0].resolved.frame.launcher.type == "slurm":
        return _submit(resolved[0].recipe, overrides, called, points, plans, detach=detach)
    from posttrain.cli.live import Live

    with Live() as live:
        todo = [SweepPoint(point.values, make) for point, make in zip(points, makes, strict=True)]
        result = run_sweep(resolved[0].recipe, overrides, called, plans[0].outputs, todo, live)
    for text, message in result.failed:
        typer.echo(f"posttrain: point {text}: {message}", err=True)
    if result.exit_code not in (EXIT_DONE, 1):
        typer.echo("posttrain: the sweep was stopped; the same command goes on with it", err=True)
    typer.echo(f"sweep: {result.folder}")
    if result.report is not None:
        typer.echo(f"report: {result.report}")
    return result.exit_code


def _submit(
    recipe: str, overrides: list[str], name: str, points: list[Point], plans: list[Plan], *, detach: bool
) -> int:
    """Submit the points to Slurm and, unless detached, follow them to their ends; returns the exit code."""
    from posttrain.cli.live import Live
    from posttrain.errors import EXIT_INTERRUPTED, EXIT_STOPPED
    from posttrain.launch.slurm.follow import follow
    from posttrain.launch.slurm.sweep import count_of, submit_sweep
    from posttrain.pipeline.run_dir import RunDir
    from posttrain.pipeline.sweep import compare_points, new_record, save_record

    folder = plans[0].outputs / "sweeps" / name
    record = new_record(folder, recipe, overrides, [point.values for point in points])
    for entry, plan in zip(record["points"], plans, strict=True):
        entry |= {"run": plan.run_name, "status": "submitted"}
    with Live() as live:
        jobs = submit_sweep(plans, folder, live)
        save_record(folder, record)
        live.note(f"sweep {name}: {len(plans)} runs, {count_of(jobs)} jobs")
        for point, plan in zip(points, plans, strict=True):
            live.note(f"  {point}  {plan.run_name}")
        if detach:
            live.note(f"when they are done, their comparison: posttrain report {name}")
            return 0
        results = []
        for number, (point, plan) in enumerate(zip(points, plans, strict=True), 1):
            live.note(f"run {plan.run_name}: {point}")
            results.append(follow(plan.run_dir, live, [later.run_dir for later in plans[number:]]))
            if results[-1].exit_code == EXIT_INTERRUPTED:
                break
    for result in results:
        if result.message:
            typer.echo(f"posttrain: {result.run_dir.name}: {result.message}", err=True)
    codes = {result.exit_code for result in results}
    if EXIT_INTERRUPTED in codes:
        cancel = RunDir(plans[0].outputs / "runs" / name).typed("cancel")
        typer.echo(f"posttrain: the sweep's points are left as they are; end them: {cancel}", err=True)
    elif EXIT_STOPPED in codes:
        typer.echo("posttrain: points were stopped; the same command goes on with them", err=True)
    report = compare_points(folder, plans[0].outputs, record)
    typer.echo(f"sweep: {folder}\nreport: {report}")
    return max(codes)


def table_of(points: list[Point], plans: list[Plan]) -> list[str]:
    """Every point with what it would run; a stage that an earlier point computes is counted there."""
    from posttrain.pipeline.plan_text import table

    seen: set[tuple[str, str]] = set()
    rows = []
    for point, plan in zip(points, plans, strict=True):
        own = [stage for stage in plan.to_do if (stage.stage.type, stage.key) not in seen]
        shared = len(plan.to_do) - len(own)
        seen |= {(stage.stage.type, stage.key) for stage in own}
        cached = sum(stage.status == "cached" for stage in plan.stages)
        rows.append((str(point), plan.run_name, ", ".join(s.name for s in own) or "-", str(shared), str(cached)))
    header = ("point", "run", "to do", "shared with a point above", "in the store")
    return [f"{plans[0].resolved.recipe}: {len(points)} points", "", *table(header, rows, right=(3, 4))]
