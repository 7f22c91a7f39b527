"""`posttrain run RECIPE [key=value …]`: plan a recipe and do what is not done yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli import options

if TYPE_CHECKING:
    from posttrain.cli.live import Live
    from posttrain.pipeline.execution import RunResult
    from posttrain.pipeline.plan import Plan


def command(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    from_: options.From = None,
    until: options.Until = None,
    only: options.Only = None,
    force: options.Force = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    name: options.Name = None,
    multirun: options.Multirun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Run although it is expensive or may not fit.")] = False,
    config_dir: options.ConfigDir = None,
) -> int:
    """Run a recipe: what is in the store already is not done again. With launcher=slurm, stages are jobs of a cluster.

    Exit codes: 0 done, 1 a stage failed, 2 bad input (nothing ran), 75 stopped and resumable, 130 interrupted.
    """
    from posttrain.config.recipe import load_recipe
    from posttrain.pipeline.plan import make_plan

    if multirun:
        from posttrain.cli.sweep import sweep

        selection = {"from_": from_, "until": until, "only": only, "force": force or ()}
        return sweep(recipe, overrides or [], config_dir, selection, name, dry_run=dry_run, yes=yes)
    resolved = load_recipe(recipe, overrides or [], config_dir=config_dir)

    def make() -> Plan:
        return make_plan(resolved, from_, until, only, force or (), name=name)

    if dry_run:
        from posttrain.pipeline.guard import guard
        from posttrain.pipeline.plan_text import render

        plan = make()
        typer.echo(render(plan, guard(plan) if not yes else ()))
        return 0
    return execute(make, yes=yes)


def execute(make: Callable[[], Plan], *, yes: bool = False, detach: bool = False, anew: bool = False) -> int:
    """Run the plan that `make()` returns with live progress; prints how it ended and returns the exit code.

    Args:
        detach: with launcher=slurm, only submit.
        anew: the plan is read off the run, and made again when another process has gone on with that meanwhile.
    """
    from posttrain.cli.live import Live
    from posttrain.errors import EXIT_DONE

    plan = make()
    with Live() as live:
        if plan.resolved.frame.launcher.type == "slurm":
            result = _submit(plan, live, yes=yes, detach=detach)
            if result is None:
                return EXIT_DONE
        else:
            from posttrain.launch.slurm.ledger import refuse_beside_jobs
            from posttrain.pipeline.runner import plan_and_run

            refuse_beside_jobs(plan.run_dir)
            result = plan_and_run(lambda: plan, live, yes=yes, again=make if anew else None)
    if result.message:
        typer.echo(f"posttrain: {result.message}", err=True)
    if result.exit_code == EXIT_DONE:
        typer.echo(f"run: {result.run_dir.path}")
    if result.report is not None:
        typer.echo(f"report: {result.report}")
    return result.exit_code


def _submit(plan: Plan, live: Live, *, yes: bool, detach: bool) -> RunResult | None:
    """Submit a plan and, unless detached, follow the run to its end; None when there is no end to tell of yet."""
    from posttrain.launch.slurm.submit import submit, told
    from posttrain.pipeline.guard import guard

    if plan.to_do and not yes:
        guard(plan)
    submitted = submit(plan, live)
    for line in told(submitted):
        live.note(line)
    if submitted.result is not None or detach:
        return submitted.result
    from posttrain.launch.slurm.follow import follow

    return follow(submitted.run, live)
