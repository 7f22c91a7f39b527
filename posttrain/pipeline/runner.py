"""Run a plan, or follow the process that runs it already."""

from __future__ import annotations

import time
from collections.abc import Callable

from posttrain.errors import EXIT_DONE, Problem, RecipeError
from posttrain.pipeline.events import EventReader
from posttrain.pipeline.execution import Execution, RunResult
from posttrain.pipeline.lock import Lock, LockHeld, Owner, held
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.progress import RunState
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.stage_runner import POLL_SECONDS, Display, Quiet


def plan_and_run(
    make: Callable[[], Plan],
    display: Display | None = None,
    *,
    yes: bool = False,
    again: Callable[[], Plan] | None = None,
) -> RunResult:
    """Make a plan, hold it against the guard unless `yes`, and execute it; `again` as in `run_plan`."""
    from posttrain.pipeline.guard import guard

    plan = make()
    check_selection(plan)
    if plan.to_do and not yes:
        guard(plan)
    return run_plan(plan, display, again)


def run_plan(plan: Plan, display: Display | None = None, again: Callable[[], Plan] | None = None) -> RunResult:
    """Execute a plan's selected stages and build the report.

    A run that another process executes already is followed to its end instead; if that process dies, this one goes on:
    with what `again` plans then, where what is to do is read off the run (what is forced the other may have done).

    Raises:
        RecipeError: nothing ran: a stage that was left out is missing, or the run's name is another recipe's.
    """
    display = display or Quiet()
    check_selection(plan)
    check_name(plan)
    run = plan.run_dir
    while True:
        try:
            lock = Lock.acquire(run.lock_path)
        except LockHeld as error:
            result = follow(run, display, error.owner)
            if result is not None and result.exit_code != EXIT_DONE:
                return result
            if again is not None:
                plan = again()
                check_selection(plan)
            if result is not None and _done(plan):
                return result
            gone = f"the process that executed run {run.name} is gone"
            left = f"the process that executed run {run.name} had another selection of stages"
            display.note(f"{gone if result is None else left}; going on with it here")
            continue
        with lock:
            return Execution(plan, run, display).run_all()


def _done(plan: Plan) -> bool:
    """Whether nothing that this plan was to do is left; what was forced is, since somebody else did not force it."""
    return not any(
        planned.forced or plan.store.find(planned.stage.type, planned.key) is None
        for planned in plan.stages
        if planned.selected
    )


def check_selection(plan: Plan) -> None:
    """Raises RecipeError unless whatever a selected stage needs and the selection leaves out is in the store."""
    needed = {one.stage for planned in plan.to_do for one in planned.inputs.values()}
    problems = [
        Problem(
            f"stage {planned.name} is left out, but a selected stage needs it and it is not in the store",
            fix=f"run it first: posttrain run {plan.resolved.recipe} … --until {planned.name}",
        )
        for planned in plan.stages
        if planned.name in needed and not planned.selected and planned.status != "cached"
    ]
    if problems:
        raise RecipeError(problems=problems)


def check_name(plan: Plan) -> None:
    """Raises RecipeError when the run's name belongs to a run of another resolved recipe."""
    run = plan.run_dir
    if run.exists() and run.record().get("recipe_digest") != plan.recipe_digest:
        raise RecipeError(
            f"run {run.name} exists and was made with other settings",
            str(run.path),
            f"choose another --name, or remove it: rm -r {run.path}",
        )


def follow(run: RunDir, display: Display, owner: Owner | None = None) -> RunResult | None:
    """Show a run that another process executes, and end with its result; None when that process died."""
    display.note(f"run {run.name} is executed by {owner or 'another process'}; following it")
    reader = EventReader(run.events_path)
    state = RunState()
    shown = False
    while True:
        still_held = held(run.lock_path)
        for event in reader.poll():
            state.update(event)
            if shown:
                display.event(event, state)
        shown = True
        if not still_held:
            break
        time.sleep(POLL_SECONDS)
    if state.exit_code is None:
        return None
    failed = [stage.message for stage in state.stages.values() if stage.status == "failed"]
    report = run.report_path if state.exit_code == EXIT_DONE and run.report_path.exists() else None
    return RunResult(run, state.exit_code, failed[-1] if failed else "", report, followed=True)
