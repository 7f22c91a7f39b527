"""Sweeps of toy runs: shared stages once, a failing point alone, stop and go on, and the comparing report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from toy_stages import toy_recipe

from posttrain.cli import report as report_command
from posttrain.config.sweep import Point
from posttrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, RecipeError, StageError
from posttrain.pipeline import sweep as sweep_module
from posttrain.pipeline.plan import make_plan
from posttrain.pipeline.run_dir import RunDir
from posttrain.pipeline.stage_runner import Quiet
from posttrain.pipeline.sweep import SweepPoint, check_sweep, find_sweep, run_sweep, sweep_name
from posttrain.report.comparison import best, differing_settings, entries_of
from posttrain.report.read import read_run

OUTPUTS = Path("outputs").absolute


def points(**settings) -> list[SweepPoint]:
    """A point for each lr; `settings` are those of all, or a list with one for each."""
    lrs = (1e-5, 2e-5, 3e-5)
    found = []
    for index, lr in enumerate(lrs):
        own = {name: value[index] if isinstance(value, list) else value for name, value in settings.items()}
        recipe = toy_recipe(lr=lr, **own)
        found.append(SweepPoint({"stages.train.lr": str(lr)}, lambda recipe=recipe: make_plan(recipe)))
    return found


def sweep(todo: list[SweepPoint], display=None):
    plans = [point.make() for point in todo]
    return run_sweep("toy", ["x=1,2,3"], sweep_name("toy", plans, None), OUTPUTS(), todo, display or Quiet())


def started() -> Counter[str]:
    runs = Path("outputs/runs").glob("*/run.json")
    found = [event for run in runs for event in RunDir(run.parent).events()]
    return Counter(event["stage"] for event in found if event["event"] == "stage_started")


def test_stages_that_points_share_are_computed_once_and_the_report_compares():
    result = sweep(points())
    assert result.exit_code == EXIT_DONE and not result.failed
    assert started() == {"data": 1, "train": 3, "evaluate": 3}
    text = (result.folder / "report.md").read_text()
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| toy-")]
    assert [row[1] for row in table[:3]] == ["1e-05", "2e-05", "3e-05"]
    assert "(best)" in table[0][3] and not any("(best)" in row[3] for row in table[1:3]), "the lowest loss"
    assert (result.folder / "report_files" / "curves_train.png").stat().st_size > 1000
    assert "stages shared with a run above" in text and "data" in table[4][-1]


def test_a_failing_point_does_not_keep_the_others_from_running():
    result = sweep(points(fail=["", "known", ""]))
    assert result.exit_code == EXIT_FAILED
    ((point, message),) = result.failed
    assert point == "stages.train.lr=2e-05" and "the loss is no number" in message
    record = json.loads((result.folder / "sweep.json").read_text())
    assert [entry["status"] for entry in record["points"]] == ["done", "failed", "done"]
    assert "stage train failed" in (result.folder / "report.md").read_text()


def test_a_point_whose_stage_cannot_go_on_does_not_end_the_sweep(monkeypatch):
    real, calls = sweep_module.run_plan, []

    def once(plan, display):
        calls.append(plan)
        if len(calls) == 2:
            raise StageError("its lock is held by a process that cannot be ended")
        return real(plan, display)

    monkeypatch.setattr(sweep_module, "run_plan", once)
    result = sweep(points())
    assert result.exit_code == EXIT_FAILED and len(result.failed) == 1 and len(calls) == 3


def test_a_shared_stage_is_forced_once(monkeypatch):
    from posttrain.cli import sweep as command

    recipes = [toy_recipe(lr=lr) for lr in (1e-5, 2e-5)]
    found = [Point({"stages.train.lr": str(lr)}, ()) for lr in (1e-5, 2e-5)]
    monkeypatch.setattr("posttrain.config.sweep.expand", lambda *_: found)
    monkeypatch.setattr("posttrain.config.sweep.load_points", lambda *_: recipes)
    selection = {"from_": None, "until": None, "only": None}
    assert command.sweep("toy", [], None, {**selection, "force": ()}, None, yes=True) == EXIT_DONE
    before = started()
    assert command.sweep("toy", [], None, {**selection, "force": ("data", "train")}, None, yes=True) == EXIT_DONE
    again = started() - before
    assert again["data"] == 1 and again["train"] == 2


class StopAt:
    """Touches STOP when the second point trains."""

    def __init__(self) -> None:
        self.points = 0

    def note(self, text: str) -> None:
        self.points += text.startswith("point ")

    def event(self, event, state) -> None:
        if self.points == 2 and event["event"] == "metrics":
            for folder in Path("outputs/store/toy_train").glob(".work-*"):
                (folder / "STOP").touch()


def test_a_stop_ends_the_sweep_and_the_same_command_goes_on():
    todo = points(steps=8, pause=0.1)
    stopped = sweep(todo, StopAt())
    assert stopped.exit_code == EXIT_STOPPED
    record = json.loads((stopped.folder / "sweep.json").read_text())
    assert [entry["status"] for entry in record["points"]] == ["done", "stopped", "pending"]
    again = sweep(todo)
    assert again.exit_code == EXIT_DONE and again.folder == stopped.folder
    assert started() == {"data": 1, "train": 4, "evaluate": 3}
    assert json.loads((again.folder / "sweep.json").read_text())["created"] == record["created"]


def test_the_disk_is_held_against_all_points_together(monkeypatch):
    plans = [point.make() for point in points(source={"rows": 30})]
    monkeypatch.setattr("posttrain.pipeline.guard.free_disk", lambda folder: 3000)
    check_sweep(plans, yes=False)
    monkeypatch.setattr("posttrain.pipeline.guard.free_disk", lambda folder: 2999)
    with pytest.raises(RecipeError):
        check_sweep(plans, yes=False)
    check_sweep(plans, yes=True)


def test_any_runs_can_be_compared(capsys):
    result = sweep(points())
    names = [run.name for run in sorted(Path("outputs/runs").iterdir())]
    report_command.command(names[:2], out=Path("both"), outputs=Path("outputs"), open_=False)
    text = Path("both/report.md").read_text()
    assert "| run | train.lr | status |" in text
    assert find_sweep(result.folder.name, Path("outputs"))[0] == Path("outputs/sweeps") / result.folder.name
    report_command.command([result.folder.name], out=None, outputs=Path("outputs"), open_=False)
    assert capsys.readouterr().out.split() == [
        "both/report.html",
        f"outputs/sweeps/{result.folder.name}/report.html",
    ]
    folders = [Path("outputs/runs") / name for name in names]
    assert list(differing_settings([read_run(folder) for folder in folders])) == ["train.lr"]
    assert len({entry.label for entry in entries_of(folders)}) == 3


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("evaluate: perplexity", [3.0, 2.0, None], 2.0),
        ("evaluate: accuracy", [0.1, 0.5], 0.5),
        ("evaluate: tokens", [1.0, 2.0], None),
        ("sft_kl: accuracy", [0.1, 0.5], 0.5),
        ("for_accuracy: perplexity", [3.0, 2.0], 2.0),
        ("train: loss", [1.0, 1.0], None),
        ("train: loss", [float("nan"), 2.0, 1.0], 1.0),
    ],
)
def test_the_best_is_marked_where_the_name_says_what_is_better(name, values, expected):
    assert best(name, values) == expected
